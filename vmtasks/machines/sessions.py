"""Who uses a machine: sessions under way, and a log of those that have ended."""

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
class Use:
    """A session that is under way. `since` in seconds since 1970."""

    verb: str
    user: str
    command: str
    pid: int
    pid_started: str
    since: float


@dataclass
class Outcome:
    """How a session ended; to be filled in by who runs it."""

    status: int = 255


@contextlib.contextmanager
def using(place: Place, verb: str, command: str = "", user: str = "", *, goes_on: bool = False) -> Iterator[Outcome]:
    """Count as a session of the machine for the length of the block, and leave a line in the access log.

    Copied binds are brought up to date in the guest first, and what is newer there comes back afterwards: when the
    machine goes with this process, as the last thing before it does; when the command goes on after us, after the
    `attach` that sees its end, or any other session.
    """
    record = place.record()
    bound = record is not None and verb in ("exec", "run", "ssh")
    back = verb == "attach" if not bound else not goes_on
    began, outcome = time.time(), Outcome()
    login = user or (record.ssh_user if record else "")
    use = Use(verb, login, command[:SHOWN_CHARS], os.getpid(), processes.started(os.getpid()), round(began, 1))
    mark = place.folder / "sessions" / f"{os.getpid()}-{time.monotonic_ns()}"
    mark.parent.mkdir(exist_ok=True)
    files.write(mark, json.dumps(asdict(use)))
    try:
        reached = record is None or not bound or binds.before(place, record)
        yield outcome
        if record is not None and back and reached and record.owner != os.getpid():
            binds.after(place, record)
    finally:
        mark.unlink(missing_ok=True)
        _log(place, use, outcome.status, time.time() - began)


def uses(place: Place) -> list[Use]:
    """The sessions under way; marks of processes that are gone are removed."""
    found = []
    for mark in sorted((place.folder / "sessions").glob("[0-9]*")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            use = Use(**json.loads(files.read(mark)))
            if processes.started(use.pid) == use.pid_started:
                found.append(use)
                continue
        with contextlib.suppress(OSError):
            mark.unlink()
    return found


def access_log(config: Config) -> Path:
    """One JSON object in each line: time, machine, user, verb, command, status, seconds."""
    return config.vm_dir / "access.log"


def _log(place: Place, use: Use, status: int, took_s: float) -> None:
    path = access_log(place.config)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(use.since)),
        "machine": place.name,
        "user": use.user,
        "verb": use.verb,
        "command": use.command,
        "status": status,
        "took_s": round(took_s, 1),
    }
    with contextlib.suppress(OSError):  # a log that cannot be written must not cost the session
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.rename(path.with_suffix(".log.1"))
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, (json.dumps(entry) + "\n").encode())
        finally:
            os.close(handle)
