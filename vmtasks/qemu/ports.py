"""Loopback ports: which are free, and which process listens on one. For messages only: QEMU binds its ports itself."""

import contextlib
import socket
from pathlib import Path


def port_free(port: int) -> bool:
    """Whether this loopback port can be bound now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def port_holder(port: int) -> str:
    """The process that listens on a loopback port, as `name (pid N)`; '' if Linux does not show it."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for handle in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        with contextlib.suppress(OSError):
            if str(handle.readlink()) in inodes:
                name = (handle.parent.parent / "comm").read_text().strip()
                return f"{name} (pid {handle.parts[2]})"
    return ""
