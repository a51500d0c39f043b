"""One QEMU: choose the accelerator, build argv, start, control and stop it."""
