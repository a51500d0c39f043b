"""Commands that outlive the connection, this process and the SSH server: started detached, followed by byte offset.

    job = start(link, "make world", cwd="src")              it now runs, whatever happens here
    end = follow(link, job, timeout_s=3600, on_data=show)   each byte once, across lost connections
    for view in listing(link): ...                          from another process too, later
    cancel(link, job)

    end = run(link, "make check", timeout_s=600, on_data=show)      start and follow; ended in the guest at the deadline

A job is a folder of mode 0700 in the guest: `command`, `title`, `user`, `boot`, `started`, `pid` of its runner, `group`
and `leader` of the command, `log` (and `err`, if stderr is separate), and at the end `status`: `exit 7 <time>` or
`signal 9 <time>`. Its name is the job's id, chosen here before anything is sent: after a start with an unknown outcome
the job is looked up by that name, so nothing is started twice.
"""

import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vmtasks.errors import CommandTimeoutError, ConfigError, ConnectionLostError, RebootedError, SshError, StateError
from vmtasks.guest import boot, jobscript, jobview
from vmtasks.guest import command as commands
from vmtasks.guest.command import Command, Lines, OnData, OnLine, Stream
from vmtasks.guest.jobview import JobView
from vmtasks.guest.link import Link
from vmtasks.host import signals

ASK_S = 60.0
READ_S = 600.0
GRACE_S = 5.0
START_S = 60.0
TITLE_BYTES = 120
TRIES = 5
GONE = 4
"""The exit status of a script that found no such job."""


@dataclass(frozen=True)
class JobEnd:
    """The end of a job. `status` is 128 + N after signal N; `signal` is its name, or empty after an exit.

    An sh prints nothing about SIGINT and SIGPIPE: these two are reported as exit statuses, 130 and 141.
    """

    view: JobView
    stdout: bytes
    stderr: bytes

    @property
    def status(self) -> int:
        """The command's exit status, as a shell reports it."""
        return 255 if self.view.status is None else self.view.status

    @property
    def signal(self) -> str:
        """The signal that ended it, such as KILL, or ''."""
        return self.view.signal


def new_id() -> str:
    """The id for a new job: 64 random bits."""
    return secrets.token_hex(8)


def start(
    link: Link,
    command: Command,
    *,
    job: str = "",
    title: str = "",
    cwd: str = "",
    env: Mapping[str, str] | None = None,
    user: str = "",
    split: bool = False,
) -> str:
    """Start a command and return its job's id; `job` is from new_id(), for callers that must record it first.

    The arguments are those of Connection.execute. `split` gives stderr its own file. If the connection breaks, the job
    is looked up: it is started once, or RebootedError or ConnectionLostError is raised.
    """
    job = _check_id(job or new_id())
    text = commands.script(command, cwd=cwd, env=env, user=user).encode(errors="surrogateescape") + b"\n"
    shown = title or (command if isinstance(command, str) else " ".join(command))
    before = link.current_boot()
    script = jobscript.start(
        job,
        text,
        title=re.sub(r"[^ -~]+", " ", shown)[:TITLE_BYTES],
        user=user,
        boot=boot.to_text(before),
        split=split,
    )
    for _ in range(TRIES):
        try:
            done = link.open().execute(script, stdin=text, timeout_s=START_S, detached=jobscript.STARTED)
        except ConnectionLostError as lost:
            link.recover(before, lost)
            continue
        if jobscript.STARTED in done.stdout:
            return job
        if jobscript.EXISTS.encode() in done.stdout:
            return _wait_started(link, job)
        raise SshError(f"a job could not be started in {link.target.name}: {done.stderr.decode(errors='replace')}")
    raise SshError(f"a job could not be started in {link.target.name}: every connection was lost")


def follow(
    link: Link,
    job: str,
    *,
    timeout_s: float,
    idle_s: float | None = None,
    offset: int = 0,
    err_offset: int = 0,
    on_data: OnData | None = None,
    on_line: OnLine | None = None,
    keep: bool = True,
) -> JobEnd:
    """Pass on a job's output from byte `offset` on, until the job ends.

    Each byte comes once, in order, whatever happens to the connection. CommandTimeoutError after `timeout_s`, or after
    `idle_s` without output; the job keeps running. RebootedError when the guest has rebooted, SshError when the job's
    runner was killed or its status cannot be read: each after the whole log was passed on. StateError when there is no
    such job.
    """
    tap = _Tap(_check_id(job), {"stdout": offset, "stderr": err_offset}, on_data, on_line, keep=keep)
    deadline = time.monotonic() + timeout_s
    link.open(wait_s=min(timeout_s, link.window_s))  # retry the first connection as long as later ones
    before = link.current_boot()
    while True:
        try:
            _follow_once(link, tap, deadline, idle_s)
            view = _read_rest(link, tap)
        except CommandTimeoutError as late:
            how = "did not end in time" if late.which == "overall" else "fell silent"
            raise late.replace(message=f"job {job} {how}") from late
        except ConnectionLostError as lost:
            try:
                link.recover(before, lost)
            except RebootedError:
                _read_rest(link, tap)
                tap.end()
                raise
            continue
        if view.state not in ("starting", "running"):
            break
    tap.end()
    _require_status(link.target.name, job, view)
    return JobEnd(view, tap.kept("stdout"), tap.kept("stderr"))


def _require_status(machine: str, job: str, view: JobView) -> None:
    """Raise RebootedError or SshError for a job that ended without a status."""
    if view.state == "rebooted":
        raise RebootedError(f"{machine} has rebooted while job {job} ran; its log until then is kept")
    if view.state == "lost":
        raise SshError(f"job {job}: its runner in the guest was killed; the command's status is unknown")
    if view.state == "damaged":
        raise SshError(
            f"job {job}: its status in {machine} cannot be read; how the command ended is unknown",
            hint=f"is the guest's disk full? vmtasks exec {machine} df",
        )


def run(
    link: Link,
    command: Command,
    *,
    timeout_s: float,
    idle_s: float | None = None,
    on_data: OnData | None = None,
    on_line: OnLine | None = None,
    keep: bool = True,
    started: Callable[[str], object] = str,
    **more: object,
) -> JobEnd:
    """Start a job and follow it to its end; `more` as for start(). `started` gets the id before anything is sent.

    On CommandTimeoutError, or an interrupt here, the job is ended in the guest.
    """
    job = new_id()
    started(job)
    try:
        start(link, command, job=job, **more)  # type: ignore[arg-type]
        return follow(link, job, timeout_s=timeout_s, idle_s=idle_s, on_data=on_data, on_line=on_line, keep=keep)
    except (CommandTimeoutError, KeyboardInterrupt) as error:
        _cancel_abandoned(link, job, error)
        raise


def listing(link: Link) -> list[JobView]:
    """All jobs of the guest, oldest first."""
    return sorted(_read_views(link, f"{jobscript.JOBS}/*"), key=lambda view: view.started)


def show(link: Link, job: str) -> JobView | None:
    """One job; None if it does not exist."""
    views = _read_views(link, f"{jobscript.JOBS}/{_check_id(job)}")
    return views[0] if views else None


def read(link: Link, job: str) -> tuple[bytes, bytes]:
    """A job's output so far: its log, and its stderr if that is separate."""
    done = link.execute(jobscript.fill(jobscript.READ, ID=_check_id(job), OUT=1, ERR=1), timeout_s=READ_S)
    if done.status == GONE:
        raise _no_job(link, job)
    return done.stdout, done.stderr


def cancel(link: Link, job: str, *, grace_s: float = GRACE_S) -> JobView:
    """End a job: SIGTERM to its process group, SIGKILL after `grace_s`; returns it with its status.

    Does nothing if the job has ended. SshError if the process group cannot be proved to be the job's.
    """
    view = show(link, job)
    if view is None:
        raise _no_job(link, job)
    if view.state == "starting":
        _wait_started(link, job)
        view = show(link, job) or view
    if view.state == "running":
        text = jobscript.cancel(job, view.group, view.user, grace_s)
        done = link.execute(text, timeout_s=ASK_S + grace_s)
        if done.status == 3:
            raise SshError(f"job {job}: the process {view.group} cannot be proved to be its own; nothing was signalled")
        view = show(link, job) or view
    return view


def remove(link: Link, job: str) -> None:
    """Remove the folder of a job that has ended. StateError while it runs."""
    if link.execute(jobscript.fill(jobscript.REMOVE, ID=_check_id(job)), timeout_s=ASK_S).status == 3:
        raise StateError(f"job {job} runs", hint="cancel it first")


class _Tap:
    """Counts a job's bytes, passes them on, and keeps them if asked."""

    def __init__(
        self, job: str, offsets: dict[Stream, int], on_data: OnData | None, on_line: OnLine | None, *, keep: bool
    ) -> None:
        self.job = job
        self.offsets = offsets
        self._on_data = on_data
        self._lines = {name: Lines(name, on_line) for name in offsets} if on_line else {}
        self._kept: dict[Stream, list[bytes]] | None = {name: [] for name in offsets} if keep else None

    def __call__(self, data: bytes, stream: Stream) -> None:
        self.offsets[stream] += len(data)
        if self._kept is not None:
            self._kept[stream].append(data)
        if self._on_data:
            self._on_data(data, stream)
        if self._lines:
            self._lines[stream].feed(data)

    def script(self, text: str) -> str:
        """A script that continues at these offsets; tail counts bytes from 1."""
        out, err = self.offsets["stdout"] + 1, self.offsets["stderr"] + 1
        return jobscript.fill(text, ID=self.job, OUT=out, ERR=err, WHICH=f"{jobscript.JOBS}/{self.job}")

    def end(self) -> None:
        for lines in self._lines.values():
            lines.end()

    def kept(self, stream: Stream) -> bytes:
        return b"".join(self._kept[stream]) if self._kept is not None else b""


def _follow_once(link: Link, tap: _Tap, deadline: float, idle_s: float | None) -> None:
    """Follow over one connection until the runner is gone."""
    left = max(0.0, deadline - time.monotonic())
    connection = link.open()
    done = connection.execute(tap.script(jobscript.FOLLOW), timeout_s=left, idle_s=idle_s, on_data=tap, keep=False)
    if done.status == GONE:
        raise _no_job(link, tap.job)
    if done.status != 0:
        raise SshError(f"job {tap.job} could not be followed: {done.stderr.decode(errors='replace')}")


def _read_rest(link: Link, tap: _Tap) -> JobView:
    """Pass on the rest of the log; returns the job's state just before."""
    stderr = b""

    def hand_on(data: bytes, stream: Stream) -> None:
        nonlocal stderr
        if stream == "stdout":
            tap(data, stream)
        else:
            stderr += data

    done = link.open().execute(tap.script(jobscript.REST), timeout_s=READ_S, on_data=hand_on, keep=False)
    if done.status == GONE:
        raise _no_job(link, tap.job)
    facts, _, errors = stderr.partition(f"\n{jobscript.MARK}\n".encode())  # a whole line: titles may contain it
    if errors:
        tap(errors, "stderr")
    views = jobview.parse(facts.decode(errors="replace"), link.boot)
    if not views:
        raise _no_job(link, tap.job)
    return views[0]


def _wait_started(link: Link, job: str) -> str:
    """Wait until a job whose start lost its connection has its runner. SshError if it gets none."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        view = show(link, job)
        if view is not None and view.state != "starting":
            return job
        time.sleep(1)
    raise SshError(f"job {job} was created but did not start: the connection broke while its command was sent")


def _cancel_abandoned(link: Link, job: str, error: BaseException) -> None:
    """End a job that is no longer followed. A failure to do so must not hide `error`."""
    try:
        with signals.cuttable():
            view = cancel(link, job)
    except (SshError, StateError) as trouble:  # it may not even have started
        error.add_note(f"job {job} may still run: {trouble.message}")
    else:
        if isinstance(error, CommandTimeoutError):
            error.message += f"; it was ended ({view.signal or view.status})"


def _read_views(link: Link, which: str) -> list[JobView]:
    """Read the state of jobs. Retries after a lost connection, because reading changes nothing."""
    for left in reversed(range(TRIES)):
        try:
            done = link.execute(jobscript.fill(jobscript.SHOW, WHICH=which), timeout_s=ASK_S)
            return jobview.parse(done.stdout.decode(errors="replace"), link.boot)
        except RebootedError:
            if not left:
                raise
        except ConnectionLostError as lost:
            if not left or not lost.explained:
                raise
    raise AssertionError("the last try returns or raises")


def _no_job(link: Link, job: str) -> StateError:
    return StateError(f"{link.target.name} has no job {job}", hint="vmtasks jobs")


def _check_id(job: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{16}", job):
        raise ConfigError(f"{job!r} is not the id of a job: 16 digits and letters a to f", hint="vmtasks jobs")
    return job
