"""Is it alive? C3 of docs/parity.md. The last of the tests of vmtasks.remote: it ends the machine that they share."""

import os
import signal
from dataclasses import replace

import pytest
from remotes import Guest, until_true

from vmtasks.remote import alive

pytestmark = pytest.mark.timeout(300)


def test_c3_each_kind_of_death_has_a_verdict_of_its_own(guest: Guest) -> None:
    def ask() -> alive.Alive:
        return alive.is_alive(guest.target, timeout_s=8, process=guest.runs, qmp_status=guest.status)

    assert (ask().verdict, ask().alive) == ("ready", True)
    guest.without_server(8, sessions=True)
    until_true(lambda: alive.banner(guest.target.port, 5) == alive.CLOSED, "the server to end")
    down = ask()
    assert (down.verdict, down.alive, down.reasons["banner"]) == ("no-ssh", True, alive.CLOSED)
    until_true(lambda: ask().verdict == "ready", "the server to be back")
    locked = alive.is_alive(replace(guest.target, user="nobody-such"), timeout_s=8)
    assert (locked.verdict, locked.alive) == ("ssh", True)
    with guest.paused():
        assert (ask().verdict, ask().alive) == ("paused", False)
        blind = alive.is_alive(guest.target, timeout_s=2)
        assert (blind.verdict, blind.alive) == ("silent", False), "the open port alone proves nothing"
    guest.root("(sleep 1; echo c >/proc/sysrq-trigger) </dev/null >/dev/null 2>&1 &")
    until_true(lambda: ask().verdict == "panicked", "the panic")
    assert not ask().alive
    os.kill(guest.pid(), signal.SIGKILL)
    until_true(lambda: not guest.runs(), "QEMU to end")
    assert (ask().verdict, ask().alive) == ("gone", False)
    assert alive.is_alive(guest.target, timeout_s=2).verdict == "gone"
