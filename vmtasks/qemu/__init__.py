"""One QEMU: choose its accelerator, build its argv, start it, talk to it, stop it."""
