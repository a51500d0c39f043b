left over on the CD
