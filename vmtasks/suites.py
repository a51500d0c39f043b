"""Sync, build and run the user's suites in a machine, and collect what they leave."""

import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from vmtasks import atomic, plan, proc, progress
from vmtasks.errors import CommandError, CommandTimeoutError, ConfigError, SshError, StateError
from vmtasks.model import SuiteTable
from vmtasks.progress import Say
from vmtasks.remote import job, ssh
from vmtasks.remote.link import Link
from vmtasks.remote.sync import FULL, VANISHED, NoRoomError, Rules, Synced, refused, sync, taken, unreadable
from vmtasks.results import ResultRecord, Results
from vmtasks.session import Machine
from vmtasks.store import write_record

ARTIFACTS_S = 600.0
CHOWN_S = 300.0


class Suites:
    """The suites of one project, in the machine that they run in."""

    def __init__(self, results: Results) -> None:
        """`results` says what is stale; what decided a result is taken from it, as it was before the sync."""
        self.config = results.config
        self.results = results
        self.machine = Machine(results.config)

    def sync(self, say: Say = progress.say) -> Synced:
        """Bring the tree into the machine. What a suite that ran as root has left there is taken back if need be."""
        target, dest = self.machine.running(), self.config.sync.dest
        self._ready.unlink(missing_ok=True)
        try:
            try:
                return self._send(target, say)
            except CommandError as error:
                if not refused(error):
                    raise
            take = ssh.script(f"chown -R -h {target.user} .", cwd=dest, env={}, user="root")
            proc.run(target.argv(ssh.remote_line(take)), timeout_s=CHOWN_S, check=False)
            return self._send(target, say)
        except CommandError as error:
            hint = f"doit ssh, and look at {dest}"
            if isinstance(error, NoRoomError) or FULL in error.stderr:
                hint = "name in sync.exclude what is not needed there, or give it a larger disk_size (installs it anew)"
            elif unreadable(error) or error.status == VANISHED:
                hint = "make it readable, or name it in sync.exclude"
            raise CommandError(f"sync: {error.message}", status=error.status, stderr=error.stderr, hint=hint) from error

    def build(self, sink: Callable[[bytes], None]) -> None:
        """Run the build command, if there is one. CommandError when it fails."""
        table = self.config.build
        self._ready.unlink(missing_ok=True)
        if table.command.strip():
            status = self._execute(
                "build", table.command, sink, cwd=self.config.sync.dest, env=table.env, timeout_s=table.timeout_s
            )
            if status != 0:
                how = f"did not end within {table.timeout_s} s" if status == proc.TIMED_OUT else f"exited with {status}"
                raise CommandError(f"build: {table.command!r} {how} in the guest", status=status)
        self._ready.touch()

    def run(self, name: str, sink: Callable[[bytes], None]) -> ResultRecord:
        """Run a suite, collect its artifacts and its JUnit file, and keep the result. Failure is a result too."""
        from vmtasks import junit  # noqa: PLC0415

        suite, parts = self.config.suites[name], self.results.parts(name)
        # With --continue doit also runs a task whose setup has failed.
        if not self._ready.exists():
            raise StateError(f"suite {name} was not run: the machine does not hold the tree, built", hint="doit build")
        folder = self.results.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        cwd = self.config.sync.dest if suite.cwd == "." else f"{self.config.sync.dest}/{suite.cwd}"
        fresh = f"rm -f {shlex.quote(suite.junit)}; " if suite.junit else ""
        began = time.monotonic()
        with (folder / "output.log").open("wb") as log:

            def both(data: bytes) -> None:
                log.write(data)
                log.flush()
                sink(data)

            status = self._execute(
                f"test-{name}",
                fresh + suite.command,
                both,
                cwd=cwd,
                env=suite.env,
                timeout_s=suite.timeout_s,
                user=suite.user,
            )
        took = time.monotonic() - began
        own = self._collect(suite, cwd, folder)
        output = (folder / "output.log").read_bytes().decode(errors="replace")
        xml, counts = junit.report(name, output, status=status, duration_s=took, fmt=suite.format, own_xml=own)
        atomic.write(self.results.xml(name), xml)
        record = ResultRecord(
            key=plan.suite_digest(parts),
            status=status or (1 if counts.failed or counts.errors else 0),
            counts=str(counts),
            duration_s=round(took, 1),
            finished=round(time.time(), 1),
            parts=parts,
        )
        write_record(self.results.folder / f"{name}.toml", record)
        return record

    @property
    def _ready(self) -> Path:
        """There while the machine holds the tree and it was built; gone as soon as either is begun anew."""
        return self.machine.folder / "ready"

    def _send(self, target: ssh.Target, say: Say) -> Synced:
        crashed = self.machine.crashed
        done = send(self.results, target, say, thorough=crashed.exists())
        crashed.unlink(missing_ok=True)
        return done

    def _execute(
        self,
        name: str,
        command: str,
        sink: Callable[[bytes], None],
        *,
        cwd: str,
        env: Mapping[str, str],
        timeout_s: float,
        user: str = "",
    ) -> int:
        """Run a command as a job, which a connection that breaks does not end; its status, 124 after `timeout_s`.

        The job's id is written down before it starts: what a killed run has left in the guest is ended by the next.
        """
        note = self.machine.folder / f"job-{name}"
        with self.machine.link() as link:
            _end_leftover(link, note)
            try:
                end = job.run(
                    link,
                    command,
                    cwd=cwd,
                    env=env,
                    user=user,
                    title=f"{name}: {command}",
                    timeout_s=timeout_s,
                    on_data=lambda data, _: sink(data),
                    keep=False,
                    started=lambda which: atomic.write(note, which),
                )
                status = end.status
                job.remove(link, end.view.job)
                note.unlink()
            except CommandTimeoutError:
                status = proc.TIMED_OUT
                _end_leftover(link, note)
            except SshError as error:
                error.log, error.hint = self.machine.console_log, error.hint or "doit status"
                raise
        return status

    def _collect(self, suite: SuiteTable, cwd: str, folder: Path) -> bytes | None:
        """Fetch artifacts into `folder`; returns the suite's own JUnit file if it wrote one."""
        patterns = [*suite.artifacts, *([suite.junit] if suite.junit else [])]
        if not patterns:
            return None
        target = self.machine.running()
        globs = " ".join(shell_glob(pattern) for pattern in patterns)
        find = f'for f in {globs}; do if [ -e "$f" ]; then printf "%s\\n" "$f"; fi; done'
        listing = proc.run(target.argv(ssh.remote_line(ssh.script(find, cwd=cwd, env={}))), timeout_s=60, check=False)
        if listing.stdout.strip():
            got = proc.run(
                [
                    "rsync",
                    "-rlts",
                    "--files-from=-",
                    "-e",
                    f"ssh -F {shlex.quote(str(target.config))}",
                    f"{target.name}:{cwd}/",
                    f"{folder}/",
                ],
                timeout_s=ARTIFACTS_S,
                check=False,
                stdin=listing.stdout,
            )
            if got.status != 0:
                sys.stdout.write(f"artifacts: not all could be fetched: {got.stderr.strip()}\n")
        own = folder / suite.junit
        return own.read_bytes() if suite.junit and own.is_file() else None


def send(results: Results, target: ssh.Target, say: Say, *, thorough: bool = False) -> Synced:
    """Bring the project's tree to `target`; raises what sync() does."""
    table, walk = results.config.sync, results.walk()
    size = sum(taken(info) for _, _, info in walk)
    return sync(
        target,
        results.source(),
        table.dest,
        Rules(walk.hidden, table.exclude, walk.ignored, size),
        delete=table.delete,
        keep=walk.names if any(walk.rules.values()) else None,
        say=lambda text: say(f"sync {table.source}: {text}"),
        thorough=thorough,
    )


def _end_leftover(link: Link, note: Path) -> None:
    """End and remove the job that a note names; one that the guest does not know needs neither."""
    if note.exists():
        with contextlib.suppress(StateError, ConfigError):
            job.cancel(link, note.read_text())
            job.remove(link, note.read_text())
        note.unlink()


def shell_glob(pattern: str) -> str:
    """A glob as a shell word: everything is quoted but `*`, `?` and bracket expressions."""
    return "".join(c if c in "*?[]-" else shlex.quote(c) for c in pattern)
