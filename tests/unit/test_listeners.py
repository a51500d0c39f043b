"""Which ports something listens on, by the kernel's word: this host's own, and tables of systems that it is not."""

import socket

import pytest

from vmtasks.guest import listeners
from vmtasks.guest.listeners import Listener
from vmtasks.host import process

DRAGONFLY = """Active Internet connections (including servers)
Proto Recv-Q Send-Q  Local Address          Foreign Address        (state)
tcp4       0      0  10.0.2.15.22           10.0.2.2.53466         ESTABLISHED
tcp4       0      0  127.0.0.1.25           *.*                    LISTEN
tcp4       0      0  *.22                   *.*                    LISTEN
tcp6       0      0  ::1.8080               *.*                    LISTEN
udp4       0      0  *.514                  *.*
"""
LINUX = """Proto Recv-Q Send-Q Local Address           Foreign Address         State
tcp        0      0 127.0.0.1:7777          0.0.0.0:*               LISTEN
tcp        0      0 :::22                   :::*                    LISTEN
tcp        0      0 fe80::1%eth0:99         :::*                    LISTEN
"""
PROC = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1E61 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1 1
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   2: 0F02000A:0016 0202000A:D0DA 01 00000000:00000000 02:000A7214 00000000     0        0 1 1
   0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000
   1: 0000000000000000FFFF00000100007F:1F91 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000
"""


@pytest.mark.parametrize(
    ("table", "found"),
    [
        (DRAGONFLY, [(22, "*"), (25, "127.0.0.1"), (8080, "::1")]),
        (LINUX, [(22, "*"), (99, "fe80::1"), (7777, "127.0.0.1")]),
        (PROC, [(22, "*"), (7777, "127.0.0.1"), (8080, "::1"), (8081, "127.0.0.1")]),
        ("", []),
        ("tcp garbage LISTEN\n  0: 01:02 0A\n\x00\n", []),
    ],
)
def test_tables_of_any_system(table: str, found: list[tuple[int, str]]):
    assert listeners.parse(table) == [Listener(port, host) for port, host in found]


def test_who_serves_an_address():
    assert Listener(22, "*").serves("127.0.0.1", 22)
    assert Listener(22, "127.0.0.1").serves("localhost", 22)
    assert not Listener(22, "10.0.2.15").serves("127.0.0.1", 22)
    assert not Listener(22, "*").serves("127.0.0.1", 23)


def test_this_host_is_told_right_and_nobody_is_called():
    def ports() -> list[Listener]:
        return listeners.parse(process.run(["sh", "-c", listeners.SCRIPT], timeout_s=20).stdout)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert Listener(port, "127.0.0.1") in ports()
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert port not in [one.port for one in ports()]
