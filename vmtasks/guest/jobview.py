"""PURE: parse a job's files, which are not trusted, into its state. See job.py for the files of a job."""

import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from vmtasks.guest import boot
from vmtasks.guest.boot import Boot

State = Literal["starting", "running", "ended", "lost", "rebooted", "damaged"]
"""`lost`: its runner was killed, and the command's status is unknown; `rebooted`: a reboot of the guest ended it;
`damaged`: its status is unreadable."""

STATUS = re.compile(r"(exit|signal) (\d{1,3}) (\d{1,11})", re.ASCII)


@dataclass(frozen=True)
class JobView:
    """A job's state now. Times are seconds since 1970 by the guest's clock, 0 if unknown; `size`: of the log."""

    job: str
    title: str
    state: State
    status: int | None = None
    signal: str = ""
    started: int = 0
    ended: int = 0
    size: int = 0
    user: str = ""
    cancelled: bool = False
    group: int = 0


def parse(text: str, boot_now: Callable[[], Boot]) -> list[JobView]:
    """Parse the output of jobscript.SHOW. `boot_now` is called only when a job's state depends on it."""
    jobs: list[dict[str, str]] = []
    for line in text.split("\n"):
        name, _, value = line.partition(" ")
        if name == "job":
            jobs.append({})
        if jobs:
            jobs[-1][name] = value
    return [_view(facts, boot_now) for facts in jobs]


def _view(facts: Mapping[str, str], boot_now: Callable[[], Boot]) -> JobView:
    """Convert a job's files. Any value is possible: users of the guest can write them."""
    state = _state(facts, boot_now)
    found = STATUS.fullmatch(facts.get("status", "")) if state == "ended" else None
    status, name = (int(found[2]), "") if found else (None, "")
    if found and status is not None and found[1] == "signal":
        name = signal.Signals(status).name.removeprefix("SIG") if status in signal.valid_signals() else str(status)
        status += 128
    return JobView(
        job=facts["job"],
        title=facts.get("title", ""),
        state=state,
        status=status,
        signal=name,
        started=_number(facts, "started"),
        ended=int(found[3]) if found else 0,
        size=_number(facts, "size"),
        user=facts.get("user", ""),
        cancelled="cancelled" in facts,
        group=_number(facts, "group"),
    )


def _state(facts: Mapping[str, str], boot_now: Callable[[], Boot]) -> State:
    """Derive the state. The status counts only once the runner has ended."""
    if "alive" in facts:
        return "running" if facts.get("group") else "starting"
    if "status" in facts:
        return "ended" if STATUS.fullmatch(facts["status"]) else "damaged"
    if boot.compare(boot.from_text(facts.get("boot", "")), boot_now()) == "rebooted":
        return "rebooted"
    return "lost" if facts.get("pid") else "starting"


def _number(facts: Mapping[str, str], name: str) -> int:
    text = facts.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else 0
