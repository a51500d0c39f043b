"""Is it alive? C3 of docs/parity.md. The last of the tests of vmtasks.guest: it ends the machine that they share."""

import os
import signal
from dataclasses import replace

import pytest
from remotes import LIMIT_S, Guest, until_true

from vmtasks.errors import ConnectionLostError
from vmtasks.guest import alive, banner

pytestmark = pytest.mark.timeout(600)


@pytest.mark.exhaustive
def test_c3_each_kind_of_death_has_a_verdict_of_its_own(guest: Guest) -> None:
    def ask() -> alive.Alive:
        return alive.is_alive(guest.target, timeout_s=8, process=guest.runs, control=guest.control)

    assert (ask().verdict, ask().alive) == ("ready", True)
    guest.without_server(8, sessions=True)
    until_true(lambda: banner.read(guest.target.port, 5) == banner.CLOSED, "the server to end")
    down = ask()
    assert (down.verdict, down.alive) == ("no-ssh", True)
    assert f"banner: no SSH server answers in the guest ({banner.CLOSED})" in str(down)
    assert [layer.passed for layer in down.layers] == [True, True, True, False, None, None]
    until_true(lambda: ask().verdict == "ready", "the server to be back")
    locked = alive.is_alive(replace(guest.target, user="nobody-such"), timeout_s=8)
    assert (locked.verdict, locked.alive) == ("ssh", True)
    with guest.paused():
        assert (ask().verdict, ask().alive) == ("paused", False)
        blind = alive.is_alive(guest.target, timeout_s=2)
        assert (blind.verdict, blind.alive) == ("silent", False), "the open port alone proves nothing"
    # The keepalives would tell after 75 s: QEMU's events do, and QMP why nobody need be waited for.
    with guest.machine().link() as link, pytest.raises(ConnectionLostError, match=r"the guest('s kernel)? panicked"):
        link.execute("echo c | doas tee /proc/sysrq-trigger; sleep 100", timeout_s=LIMIT_S)
    assert ask().verdict == "panicked"
    assert not ask().alive
    os.kill(guest.pid(), signal.SIGKILL)
    until_true(lambda: not guest.runs(), "QEMU to end")
    assert (ask().verdict, ask().alive) == ("gone", False)
    # The kernel takes a dying process's memory before its sockets: the port may answer a moment longer.
    until_true(lambda: alive.is_alive(guest.target, timeout_s=2).verdict == "gone", "the port to close")
