"""What guests of all kinds print about their boot, and what two looks at it prove."""

import pytest

from vmtasks.guest import boot
from vmtasks.guest.boot import Boot

DRAGONFLY = "boottime { sec = 1700000000, usec = 123456 } Tue Nov 14 22:13:20 2023\nnow 1700000500\n"


@pytest.mark.parametrize(
    ("printed", "uptime"),
    [
        (DRAGONFLY, 500.0),
        ("boottime { sec = 1700000000, nsec = 5 }\nnow 1700000007\n", 7.0),
        ("boottime 1700000000\nnow 1700000060\n", 60.0),
        ("boottime Tue Nov 14 22:13:20 2023\nnow 1700000500\nup  10:21PM  up 8 mins, 1 user\n", 480.0),
        ("uptime 35.71\nnow 1700000000\n", 35.71),
        ("now 1\nup  10:00:00 up 24 min,  0 users,  load average: 0.02, 0.13, 0.10\n", 24 * 60.0),
        ("now 1\nup  10:00AM  up 3 days,  2:05, 0 users\n", 3 * 86400.0 + 2 * 3600 + 5 * 60),
        ("now 1\nup  3:00pm  up 1 day, 30 secs, 2 users\n", 86430.0),
        ("now 1\nup  3:00pm  up  2 hrs, 2 users\n", 7200.0),
        ("now 1\nup uptime: not found\n", None),
        ("", None),
    ],
)
def test_uptime_as_systems_tell_it(printed: str, uptime: float | None):
    assert boot.parse(printed).uptime_s == uptime


def test_ids_and_stamps_are_kept_for_another_process():
    seen = boot.parse("boot_id 12-34\nkern.bootsessionuuid AB\nstamp /run/x:99\n", events="3")
    assert seen.ids == {"boot_id 12-34", "kern.bootsessionuuid AB"}
    again = boot.from_text(boot.to_text(seen))
    assert (again.ids, again.stamp) == (seen.ids, seen.stamp)
    assert boot.compare(again, seen) == "same"
    assert boot.compare(boot.from_text(""), seen) == "unknown"


ID_A, ID_B = Boot(ids=frozenset({"boot_id a"}), asked=0), Boot(ids=frozenset({"boot_id b"}), asked=9)


def up(uptime: float, asked: float, boottime: int | None = None, **more: object) -> Boot:
    return Boot(uptime_s=uptime, asked=asked, boottime_s=boottime, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (ID_A, ID_A, "same"),
        (ID_A, ID_B, "rebooted"),
        (ID_A, Boot(), "unknown"),  # /proc is gone: no alarm, but no proof either
        (Boot(ids=ID_A.ids, events="1"), Boot(ids=ID_A.ids, events="2"), "rebooted"),  # QEMU's word is above its own
        (Boot(ids=ID_A.ids, events="1"), Boot(ids=ID_A.ids, events="1"), "same"),
        (Boot(ids=ID_A.ids, events="1"), Boot(ids=ID_B.ids, events="1"), "rebooted"),  # kexec: QEMU sees no reset
        (Boot(ids=ID_A.ids, events="1"), Boot(ids=ID_A.ids), "same"),
        (Boot(ids=ID_A.ids, events="1"), Boot(ids=ID_B.ids, events=""), "rebooted"),
        (Boot(events="1"), Boot(events="1"), "same"),
        (Boot(events="1"), Boot(events="2"), "rebooted"),
        (Boot(stamp="/run/s:1"), Boot(stamp="/run/s:1"), "same"),
        (Boot(stamp="/run/s:1"), Boot(stamp="/run/s:2"), "rebooted"),
        (Boot(stamp="/run/s:1"), Boot(stamp="/dev/shm/s:2"), "unknown"),  # noqa: S108
        (up(100, 0, 1000), up(160, 60, 1000), "same"),
        (up(100, 0, 1000), up(160, 60, 4600), "same"),  # the clock was set forward
        (up(100, 0, 1000), up(20, 60, 1140), "rebooted"),
        (up(100, 0, 1000), up(100.5, 60, 1000), "same"),  # paused for a minute
        (up(20, 0, 1000), up(40, 120, 1100), "unknown"),  # rebooted and up for longer than before, or paused and set
        (up(20, 0), up(40, 120), "unknown"),
        (up(1440, 0, coarse_s=60), up(1440, 30, coarse_s=60), "same"),
        (up(1440, 0, coarse_s=60), up(60, 30, coarse_s=60), "rebooted"),
        (up(60, 0, coarse_s=60), up(60, 70, coarse_s=60), "unknown"),
        (up(4, 0), up(5, 1), "same"),  # it has just booted, before the first look
        (up(4, 0), up(100, 110), "unknown"),
        (Boot(), Boot(), "unknown"),
    ],
)
def test_what_two_looks_prove(before: Boot, after: Boot, verdict: str):
    assert boot.compare(before, after) == verdict
