# login shell
