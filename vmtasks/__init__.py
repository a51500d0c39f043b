"""Unattended, phase-cached OS installs in QEMU, and remote test suites that rerun only when stale."""

__version__ = "0.1.0"
