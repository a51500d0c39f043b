"""Has this guest rebooted? The identity of a boot, by the best evidence that the guest offers.

From proof to hint: QEMU's events, for our own machines, as a marker that each RESET, SHUTDOWN and start of QEMU
changes; a boot id of the kernel, which a kexec changes too; our random stamp in a folder that a boot empties; the
uptime, which only a boot resets. Setting the clock changes none of them. A pause changes only the uptime, which then
lags but does not restart.
"""

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

BootChange = Literal["same", "rebooted", "unknown"]

COARSE_S = 60.0
TOLERANCE_S = 3.0
SLACK_S = 1.0
DRIFT = 0.002
"""How much faster than the host's clock a guest's may run, as a fraction."""

PROBE = r"""
PATH=$PATH:/sbin:/usr/sbin:/bin:/usr/bin
if [ -r /proc/sys/kernel/random/boot_id ]; then
    read -r id </proc/sys/kernel/random/boot_id && echo "boot_id $id" && exit 0
fi
[ ! -r /proc/uptime ] || { read -r up _ </proc/uptime && echo "uptime $up"; }
if command -v sysctl >/dev/null 2>&1; then
    for name in kern.boot_id kern.bootsessionuuid; do
        id=$(sysctl -nx $name 2>/dev/null || sysctl -n $name 2>/dev/null) && [ -n "$id" ] && echo "$name $id" && exit 0
    done
    boot=$(sysctl -n kern.boottime 2>/dev/null) && [ -n "$boot" ] && echo "boottime $boot"
fi
echo "now $(date +%s)"
echo "up $(uptime 2>/dev/null)"
for place in /dev/shm /run /var/run; do
    [ -d $place ] && [ -w $place ] || continue
    case $(uname -s) in
    Linux) [ "$(stat -f -c %T $place 2>/dev/null)" = tmpfs ] || continue ;;
    esac
    stamp=$place/.vmtasks-boot-$(id -u)
    ( umask 077; set -C; echo "$0" >"$stamp" ) 2>/dev/null
    read -r id <"$stamp" 2>/dev/null && echo "stamp $stamp:$id" && break
done
exit 0
"""
"""The guest's part, in POSIX sh. `$0` is a random word; the first probe after a boot leaves it as the stamp."""


@dataclass(frozen=True)
class Boot:
    """The identity of one boot, as seen at one moment. `uptime_s` is None, or accurate to `coarse_s`."""

    ids: frozenset[str] = frozenset()
    stamp: str = ""
    uptime_s: float | None = None
    coarse_s: float = TOLERANCE_S
    boottime_s: int | None = None
    events: str = ""
    asked: float = field(default_factory=time.monotonic)


def script() -> str:
    """The sh script to run in the guest; pass its stdout to parse()."""
    return f"set -- {secrets.token_hex(8)}\n" + PROBE.replace('"$0"', '"$1"')


def parse(stdout: str, events: str = "") -> Boot:
    """Parse the output of script(). Missing or unknown lines only weaken the identity."""
    facts: dict[str, str] = {}
    for line in stdout.splitlines():
        name, _, value = line.partition(" ")
        facts.setdefault(name, value.strip())
    ids = {f"{name} {facts[name]}" for name in ("boot_id", "kern.boot_id", "kern.bootsessionuuid") if facts.get(name)}
    boottime = _seconds(facts.get("boottime", ""))
    now = _seconds(facts.get("now", ""))
    uptime, coarse = _number(facts.get("uptime", "")), TOLERANCE_S
    if uptime is None and boottime is not None and now is not None:
        uptime = float(now - boottime)  # setting the clock moves both
    if uptime is None:
        uptime, coarse = _parse_uptime(facts.get("up", "")), COARSE_S
    return Boot(frozenset(ids), facts.get("stamp", ""), uptime, coarse, boottime, events)


def probe(run: Callable[[str], str], events: Callable[[], str] | None = None) -> Boot:
    """Probe a guest: `run` runs a script in it and returns its stdout. `events` returns the marker of QEMU's events.

    The marker is read first: an event during the probe then shows in the next comparison.
    """
    marker = events() if events else ""
    return parse(run(script()), marker)


def compare(before: Boot, after: Boot) -> BootChange:
    """Whether the guest has rebooted between two probes; "unknown" if its evidence does not suffice."""
    if before.events and after.events and before.events != after.events:
        return "rebooted"
    kinds = [{one.partition(" ")[0]: one for one in boot.ids} for boot in (before, after)]
    both = kinds[0].keys() & kinds[1].keys()
    if both:
        return "same" if all(kinds[0][kind] == kinds[1][kind] for kind in both) else "rebooted"
    if before.events and after.events:
        return "same"
    if before.stamp and after.stamp and before.stamp.partition(":")[0] == after.stamp.partition(":")[0]:
        return "same" if before.stamp == after.stamp else "rebooted"
    return _by_uptime(before, after)


def to_text(boot: Boot) -> str:
    """The parts of an identity that outlive this process, on one line; for from_text()."""
    return " | ".join([*sorted(boot.ids), f"stamp {boot.stamp}"])


def from_text(text: str) -> Boot:
    """Parse the output of to_text()."""
    parts = text.split(" | ")
    stamp = next((part.removeprefix("stamp ") for part in parts if part.startswith("stamp ")), "")
    return Boot(frozenset(part for part in parts if part and not part.startswith("stamp")), stamp)


def _by_uptime(before: Boot, after: Boot) -> BootChange:
    if before.uptime_s is None or after.uptime_s is None:
        return "unknown"
    elapsed = after.asked - before.asked
    if after.uptime_s < before.uptime_s - max(before.coarse_s, after.coarse_s):
        return "rebooted"
    if after.uptime_s > elapsed * (1 + DRIFT) + SLACK_S:
        return "same"  # it was up before the first probe; a coarse uptime is never too high
    # It was paused, or it booted and has been up for longer than before.
    if before.boottime_s is not None and after.boottime_s is not None:
        return "same" if abs(after.boottime_s - before.boottime_s) <= TOLERANCE_S else "unknown"
    return "unknown"


def _number(text: str) -> float | None:
    found = re.match(r"\d+(\.\d+)?", text)
    return float(found[0]) if found else None


def _seconds(text: str) -> int | None:
    """Seconds since 1970 in `{ sec = N, usec = M } date`, `N` or `N.M`; the format of a date alone varies."""
    found = re.search(r"\bsec\s*=\s*(\d+)|^(\d{9,})\b", text)
    return int(found[1] or found[2]) if found else None


def _parse_uptime(text: str) -> float | None:
    """The uptime in the output of uptime(1): `up 3 days, 2:05,`, `up 5 min,`, `up 30 secs,`."""
    found = re.search(r"\bup\s+(?:(\d+) days?,?\s*)?(?:(\d+):(\d\d)|(\d+) hrs?|(\d+) min\w*|(\d+) secs?)?", text)
    if not found or not any(found.groups()):
        return None
    days, hours, minutes, hrs, mins, secs = (int(part or 0) for part in found.groups())
    return days * 86400.0 + (hours + hrs) * 3600 + (minutes + mins) * 60 + secs
