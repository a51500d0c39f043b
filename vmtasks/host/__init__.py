"""This computer: processes, signals, files, locks, progress."""
