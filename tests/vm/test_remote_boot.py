"""Has the guest rebooted? C4, C5, C8 and C12 of docs/parity.md, also for guests that have less to tell than Linux."""

import time
from collections.abc import Callable

import pytest
from remotes import LIMIT_S, Guest, until_true

from vmtasks.errors import ConnectionLostError, RebootedError
from vmtasks.guest import boot
from vmtasks.guest.link import Link, resilient
from vmtasks.qemu.events import Events

pytestmark = pytest.mark.timeout(600)

NO_PROC = "exec unshare -m /bin/sh -c 'umount -l /proc; eval \"$(cat)\"'"
"""Run what comes on stdin where /proc is not mounted."""

BSD = r"""
sysctl() {
    case $* in
    '-n kern.boottime') echo "{ sec = $(($(date +%s) - $(cut -d. -f1 /tmp/up))), usec = 123456 } Sat Nov 21 2026" ;;
    *) return 1 ;;
    esac
}
uptime() { return 1; }
stat() { return 1; }
"""
"""What DragonFly and NetBSD know: a boot time that moves with the clock. The uptime is the real one, told by a file."""

Ask = Callable[[str], str]


def plain(link: Link) -> Ask:
    return lambda text: link.open().execute(text, timeout_s=LIMIT_S).stdout.decode()


def without_proc(link: Link) -> Ask:
    return lambda text: (
        link.open().execute(NO_PROC, stdin=text.encode(), user="root", timeout_s=LIMIT_S).stdout.decode()
    )


def like_a_bsd(link: Link) -> Ask:
    def ask(text: str) -> str:
        link.open().execute("cat /proc/uptime >/tmp/up", timeout_s=LIMIT_S)
        return without_proc(link)(BSD + text)

    return ask


@pytest.mark.exhaustive
def test_c5_no_alarm_from_clock_or_pause(guest: Guest) -> None:
    with guest.link() as link:
        ways = [plain(link), without_proc(link), like_a_bsd(link)]
        before = [boot.probe(ask) for ask in ways]
        assert [bool(one.ids) for one in before] == [True, False, False]
        assert [bool(one.stamp) for one in before] == [False, True, False]
        assert before[2].boottime_s

        def verdicts() -> list[str]:
            return [boot.compare(old, boot.probe(ask)) for old, ask in zip(before, ways, strict=True)]

        assert verdicts() == ["same"] * 3
        for step in (3600, -7200, 3600):
            guest.root(f"date -s @$(($(date +%s) + {step}))")
            assert verdicts() == ["same"] * 3, step
        with guest.paused():
            time.sleep(5)
        assert verdicts() == ["same"] * 3


@pytest.mark.exhaustive
def test_c4_c8_c12_a_reboot_is_told_from_a_loss(guest: Guest) -> None:
    calls = []

    @resilient
    def update(link: Link, text: str) -> bytes:
        calls.append(text)
        return link.open().execute(text, timeout_s=LIMIT_S).stdout

    with guest.link(console=guest.console, alive=guest.runs, keepalive_s=1) as link, guest.link() as other:
        ways = [plain(other), without_proc(other)]
        before = [boot.probe(ask) for ask in ways]
        assert update(link, "echo fine") == b"fine\n"
        with pytest.raises(ConnectionLostError, match="the guest has not rebooted") as lost:
            link.execute("echo once >>runs; doas kill -9 $PPID; sleep 60", timeout_s=LIMIT_S)
        assert lost.value.started
        with pytest.raises(ConnectionLostError, match="the guest has not rebooted"):
            update(link, "echo once >>runs; doas kill -9 $PPID; sleep 60")
        assert len(calls) == 2, "a command whose outcome is not known is not run again"
        assert link.execute("cat runs; rm runs", timeout_s=LIMIT_S).stdout == b"once\nonce\n"
        connection = link.open()
        guest.without_server(4, sessions=True)
        until_true(lambda: not connection.is_connected(), "the end of the session")
        assert link.execute("echo again", timeout_s=LIMIT_S).stdout == b"again\n", "an idle loss is nobody's loss"
        with pytest.raises(RebootedError) as rebooted:
            link.execute("(sleep 1; doas reboot -f) & sleep 200", timeout_s=180)
        assert rebooted.value.console
        other.close()
        assert [boot.compare(old, boot.probe(ask)) for old, ask in zip(before, ways, strict=True)] == ["rebooted"] * 2
        assert link.execute("echo up", timeout_s=LIMIT_S).stdout == b"up\n"


@pytest.mark.exhaustive
def test_c5_a_reset_is_noticed_by_qemus_events(guest: Guest) -> None:
    """Nothing else could tell within the deadline: the guest says no word more, and no keepalive is due."""
    events = Events(guest.machine().place.events).boot_marker
    with guest.link(events=events, keepalive_s=3600, alive=guest.runs) as link:
        with pytest.raises(RebootedError):
            link.execute("echo begun; sleep 900", timeout_s=600, on_data=lambda *_: guest.qmp("system_reset"))
        assert link.execute("echo up", timeout_s=LIMIT_S).stdout == b"up\n"


@pytest.mark.exhaustive
def test_c12_the_window_ends_with_the_reason(guest: Guest) -> None:
    with guest.link(window_s=3, connect_s=2, keepalive_s=0.5) as link:
        try:
            with pytest.raises(ConnectionLostError, match=r"did not come back within 3 s: .* nothing behind it spoke"):
                link.execute("echo begun; sleep 60", timeout_s=LIMIT_S, on_data=lambda *_: guest.qmp("stop"))
        finally:
            guest.qmp("cont")
