"""PURE: the TCP ports that a guest listens on, from its kernel's tables. Makes no connection."""

import ipaddress
import re
from dataclasses import dataclass

SCRIPT = """
PATH=$PATH:/sbin:/usr/sbin:/bin:/usr/bin
if [ -r /proc/net/tcp ]; then cat /proc/net/tcp /proc/net/tcp6 2>/dev/null; exit 0; fi
exec netstat -an
"""
"""Prints the input of parse(). DragonFly and the other BSDs have no /proc/net."""

_PROC = re.compile(r"\s*\d+: ([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4}) [0-9A-F]+:[0-9A-F]{4} 0A ")
_NETSTAT = re.compile(r"tcp\S*\s+\d+\s+\d+\s+(\S+)[.:](\d+)\s+\S+\s+LISTEN\b")


@dataclass(frozen=True, order=True)
class Listener:
    """A port, and the guest's address that it is bound to; `*` is any."""

    port: int
    host: str

    def __str__(self) -> str:
        """`22`, or `631 of 127.0.0.1`."""
        return str(self.port) if self.host == "*" else f"{self.port} of {self.host}"

    def serves(self, host: str, port: int) -> bool:
        """Whether it accepts connections to this address and port of the guest."""
        return self.port == port and self.host in ("*", _plain(host))


def parse(text: str) -> list[Listener]:
    """Parse the output of SCRIPT: the kernel's tables on Linux, or netstat's on any system."""
    found = set()
    for line in text.split("\n"):
        if of_proc := _PROC.match(line):
            found.add(Listener(int(of_proc[2], 16), _plain(_unpacked(of_proc[1]))))
        elif of_netstat := _NETSTAT.match(line):
            found.add(Listener(int(of_netstat[2]), _plain(of_netstat[1])))
    return sorted(found)


def _unpacked(coded: str) -> str:
    """Decode an address as a little-endian kernel prints it, in words of four bytes."""
    words = [bytes.fromhex(coded[at : at + 8])[::-1] for at in range(0, len(coded), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def _plain(host: str) -> str:
    """Normalize an address for Listener."""
    if host in ("*", "localhost"):
        return "*" if host == "*" else "127.0.0.1"
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return "*" if address.is_unspecified else str(address)
