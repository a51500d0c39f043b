"""Sync, build and run the user's suites in a machine; keep each result with the digest of all that decided it."""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from vmtasks import atomic, plan, proc
from vmtasks.build import PhaseRecord
from vmtasks.config import Config
from vmtasks.errors import CommandError, SshError
from vmtasks.model import SuiteTable
from vmtasks.progress import seconds
from vmtasks.remote import ssh
from vmtasks.remote.sync import Synced, sync, tree_digest
from vmtasks.session import Machine
from vmtasks.store import read_record, write_record

ARTIFACTS_S = 600.0


class ResultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a suite's last run ended. `status` is its exit status; `counts` is for people."""

    key: str
    status: int
    counts: str
    duration_s: float
    finished: float
    parts: dict[str, str] = {}


class Suites:
    """The suites of one project, and the machine that they run in."""

    def __init__(self, config: Config) -> None:
        """Nothing is touched yet."""
        self.config = config
        self.machine = Machine(config)
        self.results = config.vm_dir / "results"

    # -- what is stale

    def xml(self, name: str) -> Path:
        """JUnit result of a suite."""
        return self.results / f"{name}.xml"

    def last(self, name: str) -> ResultRecord | None:
        """The suite's last result, passed or failed."""
        return read_record(self.results / f"{name}.toml", ResultRecord)

    def why_stale(self, name: str) -> str:
        """Why the suite must run; empty when its last result still stands."""
        last = self.last(name)
        if last is None or not self.xml(name).is_file():
            return "it has not run yet"
        if last.status != 0:
            return f"it failed the last time ({last.counts})"
        parts = self._parts(name)
        changed = [what for what, value in parts.items() if last.parts.get(what) != value]
        return f"changed: {', '.join(changed)}" if changed else ""

    def source(self) -> Path:
        """The tree to sync."""
        return self.config.root / self.config.sync.source

    def excludes(self) -> list[str]:
        """The user's patterns, and our own state if it lies in the tree."""
        vm_dir, source = self.config.vm_dir.resolve(), self.source().resolve()
        own = [f"/{vm_dir.relative_to(source)}/"] if vm_dir.is_relative_to(source) and vm_dir != source else []
        return [*own, *self.config.sync.exclude]

    def _parts(self, name: str) -> dict[str, str]:
        """What decides the suite's result, each as a short text that changes when it does."""
        suite, config = self.config.suites[name], self.config
        decides = {k: v for k, v in msgspec.structs.asdict(suite).items() if k not in {"artifacts", "timeout_s"}}
        return {
            "tree": tree_digest(self.source(), self.excludes(), config.vm_dir / "tree.json"),
            "image": self._image_sha256(),
            "suite": plan.suite_digest(decides),
            "build": plan.suite_digest(
                {"command": config.build.command, "env": config.build.env, "dest": config.sync.dest}
            ),
        }

    def _image_sha256(self) -> str:
        record = self.machine.record()
        path = self.machine.snapshot_record(
            record.snapshot if record and record.guest == self.config.label else "clean"
        )
        named = read_record(path, PhaseRecord)
        return named.sha256 if named else ""

    # -- doing

    def sync(self) -> Synced:
        """Bring the tree into the machine."""
        target = self.machine.running()
        table = self.config.sync
        return sync(target, self.source(), table.dest, self.excludes(), delete=table.delete)

    def build(self, sink: Callable[[bytes], None]) -> None:
        """Run the build command, if there is one. CommandError when it fails."""
        table = self.config.build
        if not table.command.strip():
            return
        text = ssh.script(table.command, cwd=self.config.sync.dest, env=table.env, pidfile="/tmp/.vmtasks-build")  # noqa: S108 - in the guest
        status = self._execute(text, sink, table.timeout_s, "/tmp/.vmtasks-build", "")  # noqa: S108
        if status != 0:
            how = f"did not end within {table.timeout_s} s" if status == proc.TIMED_OUT else f"exited with {status}"
            raise CommandError(f"build: {table.command!r} {how} in the guest", status=status)

    def run(self, name: str, sink: Callable[[bytes], None]) -> ResultRecord:
        """Run a suite, collect its artifacts and its JUnit file, and keep the result. Failure is a result too."""
        from vmtasks import junit  # noqa: PLC0415

        suite, parts = self.config.suites[name], self._parts(name)
        folder = self.results / name
        folder.mkdir(parents=True, exist_ok=True)
        pidfile = f"/tmp/.vmtasks-{name}"  # noqa: S108 - in the guest
        cwd = self.config.sync.dest if suite.cwd == "." else f"{self.config.sync.dest}/{suite.cwd}"
        fresh = f"rm -f {shlex.quote(suite.junit)}; " if suite.junit else ""
        text = ssh.script(fresh + suite.command, cwd=cwd, env=suite.env, user=suite.user, pidfile=pidfile)
        began = time.monotonic()
        with (folder / "output.log").open("wb") as log:

            def both(data: bytes) -> None:
                log.write(data)
                log.flush()
                sink(data)

            status = self._execute(text, both, suite.timeout_s, pidfile, suite.user)
        took = time.monotonic() - began
        own = self._collect(suite, cwd, folder)
        output = (folder / "output.log").read_bytes().decode(errors="replace")
        xml, counts = junit.report(name, output, status=status, duration_s=took, fmt=suite.format, own_xml=own)
        atomic.write(self.xml(name), xml)
        record = ResultRecord(
            key=plan.suite_digest(parts),
            status=status or (1 if counts.failed or counts.errors else 0),
            counts=str(counts),
            duration_s=round(took, 1),
            finished=round(time.time(), 1),
            parts=parts,
        )
        write_record(self.results / f"{name}.toml", record)
        return record

    def _execute(self, text: str, sink: Callable[[bytes], None], timeout_s: float, pidfile: str, user: str) -> int:
        target = self.machine.running()
        status = ssh.execute(target, text, sink, timeout_s=timeout_s, at_deadline=ssh.end_script(pidfile, user))
        if status == ssh.FAILED and not ssh.is_ready(target):
            raise SshError(
                f"the connection to {target.name} was lost; how the command ended is not known",
                log=self.machine.console_log,
                hint="doit status",
            )
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
                    "-rlt",
                    "--files-from=-",
                    "-e",
                    f"ssh -F {target.config}",
                    f"{target.name}:{shlex.quote(cwd)}/",
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


def shell_glob(pattern: str) -> str:
    """A glob as a shell word: everything is quoted but `*`, `?` and bracket expressions."""
    return "".join(c if c in "*?[]-" else shlex.quote(c) for c in pattern)


def describe(record: ResultRecord) -> str:
    """`9 passed in 4.1 s`."""
    return f"{record.counts} in {seconds(record.duration_s)}"
