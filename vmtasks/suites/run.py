"""Sync, build and run the user's suites in a machine, and collect their results and artifacts."""

import contextlib
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

import msgspec

from vmtasks.config.load import parse_size, show_size
from vmtasks.config.tables import BuildTable, SuiteTable
from vmtasks.errors import CommandError, CommandTimeoutError, ConfigError, SshError, StateError, VmTasksError
from vmtasks.guest import artifacts, connect, job, ssh
from vmtasks.guest.artifacts import Fetched
from vmtasks.guest.link import Link
from vmtasks.guest.sync import (
    FULL,
    VANISHED,
    Filter,
    NoRoomError,
    Synced,
    allocated_bytes,
    read_failed,
    sync,
    write_denied,
)
from vmtasks.host import files, process, progress
from vmtasks.host.locks import lock
from vmtasks.host.progress import Say
from vmtasks.images import plan
from vmtasks.machines import Machine
from vmtasks.store.records import read_record, write_record
from vmtasks.suites import junit
from vmtasks.suites.results import BUILD, LOG, ResultRecord, Results

CHOWN_S = 300.0
WAIT_S = 86400.0
"""Limit for waiting for other runs in the same machine: a suite may take that long."""
JUNIT_BYTES = 64 << 20
"""Limit for a suite's own JUnit file; its elements take several times that in memory."""
OUTPUT_BYTES = 256 << 20
"""Limit for the part of a suite's output that is kept and judged; all of it is shown."""


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """The tree in the machine: digests of its files, of its source and place (`where`), and of the build (`built`).

    `failed`: why the build failed, or ''.
    """

    tree: str
    where: str
    built: str = ""
    failed: str = ""


class _NotBuiltError(StateError):
    """The build that a suite needs has failed."""


class Suites:
    """The suites of one project, in the machine that they run in. One run at a time uses its tree."""

    def __init__(self, results: Results, note: Say = progress.say) -> None:
        """`results` says what is stale; `note` receives messages for the user."""
        self.config = results.config
        self.results = results
        self.machine = Machine(results.config)
        self.note = note

    def sync(self) -> Synced:
        """Copy the tree into the machine. Files that a suite left as root are given to the login user if necessary."""
        with self._alone():
            return self._sync()[0]

    def build(self, sink: Callable[[bytes], None]) -> None:
        """Run the build command, if there is one. CommandError if it fails; that is also written as JUnit XML."""
        with self._alone():
            self._build(sink, self._held() or self._sync()[1])

    def run(self, name: str, sink: Callable[[bytes], None]) -> ResultRecord:
        """Run a suite, collect its artifacts and its JUnit file, and keep the result. Failure is a result too.

        The last result is removed before the run. Whatever ends the run, it leaves a result that says what happened. A
        stale suite that another run has just finished is not run again.
        """
        with self._alone_with(name):
            last = self.results.last(name)
            if name in self.results.stale and last is not None and not self.results.why_stale(name):
                self.note(f"test:{name}: another run has made it meanwhile")
                return last
            folder = self.results.begin(name)
            try:
                with self._alone():
                    return self._run(name, sink, folder)
            except _NotBuiltError:
                self.results.forget(name)  # the build has a result
                raise
            except BaseException as error:
                self._broken(name, error, folder / LOG)
                raise

    # -- parts

    def _alone(self) -> contextlib.AbstractContextManager[int]:
        """Lock the tree in the machine. StateError if the machine does not run."""
        self.machine.require_running()
        what = f"the tree in machine {self.machine.name}"
        path = self.machine.folder / "tree.lock"
        return lock(path, what, timeout_s=WAIT_S, waiting=lambda who: self.note(f"{what}: {who} uses it; waiting"))

    def _alone_with(self, name: str) -> contextlib.AbstractContextManager[int]:
        """Lock the suite's result: the same suite may run in another machine of the project."""
        what = f"the result of suite {name}"
        path = self.results.folder / f".{name}.lock"
        return lock(path, what, timeout_s=WAIT_S, waiting=lambda who: self.note(f"{what}: {who} makes it; waiting"))

    @property
    def _ready(self) -> Path:
        """The record of the tree in the machine; it does not exist during a sync."""
        return self.machine.folder / "ready"

    def _held(self) -> Tree | None:
        """The record of the tree in the machine, if its source and place are those of the configuration."""
        held = read_record(self._ready, Tree)
        return held if held is not None and held.where == self.results.where else None

    def _sync(self) -> tuple[Synced, Tree]:
        target, held = self.machine.require_running(), Tree(tree=self.results.tree, where=self.results.where)
        self._ready.unlink(missing_ok=True)
        try:
            try:
                done = self._send(target)
            except CommandError as error:
                if not write_denied(error):
                    raise
                with contextlib.suppress(SshError), self.machine.link() as link:
                    take = ["chown", "-R", "-h", target.user, "."]
                    link.execute(take, cwd=self.config.sync.dest, user="root", timeout_s=CHOWN_S)
                done = self._send(target)
        except CommandError as error:
            raise error.replace(message=f"sync: {error.message}", hint=self._sync_hint(error)) from error
        write_record(self._ready, held)
        return done, held

    def _sync_hint(self, error: CommandError) -> str:
        if isinstance(error, NoRoomError) or FULL in error.stderr:
            return "name in sync.exclude what is not needed there, or give it a larger disk_size, which installs again"
        if read_failed(error) or error.status == VANISHED:
            return "make it readable, or name it in sync.exclude"
        return f"doit ssh, and look at {self.config.sync.dest}"

    def _send(self, target: ssh.Target) -> Synced:
        crashed = self.machine.place.crashed
        done = send(self.results, target, self.note, thorough=crashed.exists())
        crashed.unlink(missing_ok=True)
        return done

    def _build(self, sink: Callable[[bytes], None], held: Tree) -> Tree:
        """Build the tree in the machine; returns its new record."""
        table, plain = self.config.build, Tree(tree=held.tree, where=held.where)
        write_record(self._ready, plain)
        if table.command.strip():
            log, cwd = self.results.begin(BUILD) / LOG, self.config.sync.dest
            try:
                with log.open("wb") as data:
                    ended = self._execute(
                        "build", table.command, _Output(data, sink), cwd=cwd, env=table.env, timeout_s=table.timeout_s
                    )
                _require_built(ended, table)
            except BaseException as error:
                if isinstance(error, VmTasksError):
                    write_record(self._ready, msgspec.structs.replace(plain, failed=error.message))
                self._broken(BUILD, error, log)
                raise
        held = msgspec.structs.replace(plain, built=self.results.built)
        write_record(self._ready, held)
        self.results.forget(BUILD)
        return held

    def _built(self, name: str, sink: Callable[[bytes], None]) -> Tree:
        """The record of the built tree. Syncs and builds if another run has synced meanwhile without building."""
        held = self._held()
        if held is not None and held.failed:
            raise _NotBuiltError(f"suite {name} was not run: {held.failed}", hint="doit build")
        if held is None or held.built != self.results.built:
            self.note(f"machine {self.machine.name} does not hold the tree, built: it is synced and built again")
            held = self._build(sink, self._sync()[1])
        return held

    def _broken(self, name: str, error: BaseException, log: Path) -> None:
        """Write down what ended a run. If even that fails, the result still says that the run has not ended."""
        with contextlib.suppress(OSError):
            self.results.broken(name, _sentence(error), _read(log))

    def _run(self, name: str, sink: Callable[[bytes], None], folder: Path) -> ResultRecord:
        suite, parts = self.config.suites[name], self.results.parts(name)
        held = self._built(name, sink)
        parts = {**parts, "tree": held.tree}
        self.note(f"test:{name}: {suite.command}")
        cwd = self.config.sync.dest if suite.cwd == "." else f"{self.config.sync.dest}/{suite.cwd}"
        fresh = f"rm -rf {shlex.quote('./' + suite.junit)}; " if suite.junit else ""
        began = time.monotonic()
        with (folder / LOG).open("wb") as log:
            output = _Output(log, sink)
            ended = self._execute(
                f"test-{name}",
                fresh + suite.command,
                output,
                cwd=cwd,
                env=suite.env,
                timeout_s=suite.timeout_s,
                user=suite.user,
            )
        took = time.monotonic() - began
        fetched = self._collect(suite, cwd, folder / "artifacts")
        left = [*([f"{LOG}: cut after {show_size(OUTPUT_BYTES)}"] if output.cut else []), *fetched.messages()]
        for line in left:
            self.note(f"test:{name}: {line}")
        own, problem = _own_report(suite.junit, folder / "artifacts", fetched)
        made = junit.report(
            name, _read(folder / LOG), ended=ended, duration_s=took, fmt=suite.format, own_xml=own, problem=problem
        )
        record = ResultRecord(
            key=plan.digest_of("suite", parts),
            status=ended.status or (0 if made.counts.green else 1),
            counts=str(made.counts),
            duration_s=round(took, 1),
            finished=round(time.time(), 1),
            parts=parts,
            timed_out=ended.timed_out,
            trouble=made.trouble,
            left=left,
        )
        self.results.publish(name, made.xml, record)
        return record

    def _execute(
        self,
        name: str,
        command: str,
        output: "_Output",
        *,
        cwd: str,
        env: Mapping[str, str],
        timeout_s: float,
        user: str = "",
    ) -> process.Ended:
        """Run a command as a job, which survives a broken connection.

        The job's id is written down before it starts, so that the next run can end the job of a killed one. SshError if
        the job's end is unknown.
        """
        note, began = self.machine.folder / f"job-{name}", time.monotonic()
        with self.machine.link() as link:
            try:
                _end_leftover(link, note)
                end = job.run(
                    link,
                    command,
                    cwd=cwd,
                    env=env,
                    user=user,
                    title=f"{name}: {command}",
                    timeout_s=timeout_s,
                    on_data=lambda data, _: output(data),
                    keep=False,
                    started=lambda which: files.write(note, which),
                )
                job.remove(link, end.view.job)
                note.unlink()
            except CommandTimeoutError as late:
                if time.monotonic() - began < timeout_s:
                    raise  # a query to the guest timed out, not the job
                if getattr(late, "__notes__", ()):
                    said = f"{name} did not end within {timeout_s:g} s, and could not be ended in the guest"
                    raise SshError(said, log=self.machine.place.console_log, hint="doit status") from late
                with contextlib.suppress(SshError):  # the job has ended; the next run removes the rest
                    _end_leftover(link, note)
                return process.AT_DEADLINE
            except SshError as error:
                raise error.replace(log=self.machine.place.console_log, hint=error.hint or "doit status") from error
        return process.Ended(end.status)

    def _collect(self, suite: SuiteTable, cwd: str, dest: Path) -> Fetched:
        """Fetch the suite's own JUnit file and its artifacts into `dest`."""
        if not suite.junit and not suite.artifacts:
            return Fetched()
        try:
            with connect.connect(self.machine.require_running(), timeout_s=connect.TRY_S) as connection:
                return artifacts.fetch(
                    connection,
                    cwd,
                    dest,
                    names=[suite.junit] if suite.junit else [],
                    globs=suite.artifacts,
                    limit=parse_size(suite.artifacts_limit),
                    timeout_s=suite.artifacts_timeout_s,
                )
        except (SshError, StateError) as error:
            return Fetched(left={"": error.message})


def send(results: Results, target: ssh.Target, say: Say, *, thorough: bool = False) -> Synced:
    """Copy the project's tree to `target`; raises what sync() raises."""
    table, walk = results.config.sync, results.walk()
    size = sum(allocated_bytes(info) for _, info in walk)
    return sync(
        target,
        results.source(),
        table.dest,
        Filter(walk.hidden, table.exclude, walk.ignored, size),
        delete=table.delete,
        keep=walk.ignores if any(walk.rules.values()) else None,
        say=lambda text: say(f"sync {table.source}: {text}"),
        thorough=thorough,
    )


class _Output:
    """Passes a command's output on to a sink, and its first OUTPUT_BYTES to a log."""

    def __init__(self, log: IO[bytes], sink: Callable[[bytes], None]) -> None:
        self._log = log
        self._sink = sink
        self._left = OUTPUT_BYTES
        self.cut = False

    def __call__(self, data: bytes) -> None:
        self._log.write(data[: self._left])
        self._log.flush()
        self.cut |= len(data) > self._left
        self._left -= min(len(data), self._left)
        self._sink(data)


def _read(log: Path) -> str:
    return log.read_bytes().decode(errors="replace") if log.is_file() else ""


def _sentence(error: BaseException) -> str:
    """What ended a run, for its result."""
    if isinstance(error, VmTasksError):
        return "; ".join([error.message, *getattr(error, "__notes__", ())])
    if isinstance(error, KeyboardInterrupt):
        return f"it was interrupted by {error}" if str(error) else "it was interrupted"
    return f"{type(error).__name__}: {error}"


def _require_built(ended: process.Ended, table: BuildTable) -> None:
    if ended.status == 0:
        return
    how = f"did not end within {table.timeout_s} s" if ended.timed_out else f"exited with {ended.status}"
    said = f"build: {table.command!r} {how} in the guest"
    raise CommandError(said, status=ended.status, timed_out=ended.timed_out)


def _own_report(name: str, folder: Path, fetched: Fetched) -> tuple[bytes | None, str]:
    """Return the JUnit file that the suite wrote, or why an expected one is missing."""
    path = PurePosixPath(name)
    if not name:
        return None, ""
    if str(path) not in fetched.files:
        why = fetched.left.get(str(path)) or fetched.left.get(name) or fetched.left.get("", "it did not come")
        return None, f"the suite was to write the JUnit file {name}: {why}"
    if (folder / path).stat().st_size > JUNIT_BYTES:
        return None, f"the suite's JUnit file {name} is larger than {show_size(JUNIT_BYTES)}"
    return (folder / path).read_bytes(), ""


def _end_leftover(link: Link, note: Path) -> None:
    """End and remove the job that a note names, if the guest knows it."""
    if note.exists():
        with contextlib.suppress(StateError, ConfigError):
            job.cancel(link, note.read_text())
            job.remove(link, note.read_text())
        note.unlink()
