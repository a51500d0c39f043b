"""Sessions of a machine: those that are active, and a log of those that have ended."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vmtasks.config.load import Config
from vmtasks.host import files, processes
from vmtasks.machines import binds
from vmtasks.machines.folder import Place

LOG_BYTES = 1 << 20
SHOWN_CHARS = 200


@dataclass(frozen=True)
class Session:
    """An active session. `since`: seconds since 1970."""

    verb: str
    user: str
    command: str
    pid: int
    pid_started: str
    since: float


@dataclass
class SessionResult:
    """The exit status of a session, set by the code that runs it."""

    status: int = 255


@contextlib.contextmanager
def recorded_session(
    place: Place, verb: str, command: str = "", user: str = "", *, goes_on: bool = False
) -> Iterator[SessionResult]:
    """List the block as a session of the machine, and append a line to the access log at its end.

    Copies binds into the guest first, and newer files back afterwards. If the machine ends with this process, its
    removal copies them back; if the command outlives this process, the `attach` that sees its end, or any later
    session, does.
    """
    record = place.record()
    bound = record is not None and verb in ("exec", "run", "ssh")
    back = verb == "attach" if not bound else not goes_on
    began, result = time.time(), SessionResult()
    login = user or (record.ssh_user if record else "")
    entry = Session(verb, login, command[:SHOWN_CHARS], os.getpid(), processes.started(os.getpid()), round(began, 1))
    mark = place.folder / "sessions" / f"{os.getpid()}-{time.monotonic_ns()}"
    mark.parent.mkdir(exist_ok=True)
    files.write(mark, json.dumps(asdict(entry)))
    try:
        reached = record is None or not bound or binds.copy_in(place, record)
        yield result
        if record is not None and back and reached and record.owner != os.getpid():
            binds.copy_out(place, record)
    finally:
        mark.unlink(missing_ok=True)
        _log(place, entry, result.status, time.time() - began)


def active_sessions(place: Place) -> list[Session]:
    """The active sessions; removes the marks of dead processes."""
    found = []
    for mark in sorted((place.folder / "sessions").glob("[0-9]*")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            entry = Session(**json.loads(files.read(mark)))
            if processes.started(entry.pid) == entry.pid_started:
                found.append(entry)
                continue
        with contextlib.suppress(OSError):
            mark.unlink()
    return found


def access_log(config: Config) -> Path:
    """One JSON object in each line: time, machine, user, verb, command, status, seconds."""
    return config.vm_dir / "access.log"


def _log(place: Place, entry: Session, status: int, took_s: float) -> None:
    path = access_log(place.config)
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.since)),
        "machine": place.name,
        "user": entry.user,
        "verb": entry.verb,
        "command": entry.command,
        "status": status,
        "took_s": round(took_s, 1),
    }
    with contextlib.suppress(OSError):  # an unwritable log must not fail the session
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.rename(path.with_suffix(".log.1"))
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, (json.dumps(line) + "\n").encode())
        finally:
            os.close(handle)
