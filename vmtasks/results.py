"""The suites' last results, each with the digests of all that decided it; and why one does not stand any more."""

from functools import cached_property
from pathlib import Path

import msgspec

from vmtasks import plan
from vmtasks.config import Config
from vmtasks.errors import ConfigError
from vmtasks.private import Private
from vmtasks.progress import seconds
from vmtasks.remote.tree import Walk, tree_digest
from vmtasks.state import CLEAN, PhaseRecord, State
from vmtasks.store import read_record


class ResultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a suite's last run ended. `status` is its exit status; `counts` is for people."""

    key: str
    status: int
    counts: str
    duration_s: float
    finished: float
    parts: dict[str, str] = {}


class Results:
    """The results of one project."""

    def __init__(self, config: Config) -> None:
        """Nothing is read yet."""
        self.config = config
        self.state = State(config)
        self.folder = config.vm_dir / "results"

    def xml(self, name: str) -> Path:
        """JUnit result of a suite."""
        return self.folder / f"{name}.xml"

    def last(self, name: str) -> ResultRecord | None:
        """The suite's last result, passed or failed."""
        return read_record(self.folder / f"{name}.toml", ResultRecord)

    def why_stale(self, name: str) -> str:
        """Why the suite must run; empty when its last result still stands."""
        last = self.last(name)
        if last is None or not self.xml(name).is_file():
            return "it has not run yet"
        if last.status != 0:
            return f"it failed the last time ({last.counts})"
        parts = self.parts(name)
        changed = [what for what, value in parts.items() if last.parts.get(what) != value]
        return f"changed: {', '.join(changed)}" if changed else ""

    def source(self) -> Path:
        """The tree to sync."""
        return self.config.root / self.config.sync.source

    def walk(self) -> Walk:
        """A look at the tree to sync. ConfigError when it is in a place that never goes into a guest."""
        private, source, table = Private(self.config), self.source(), self.config.sync
        place = private.around(source)
        if place is not None:
            raise ConfigError(
                f"sync.source = {table.source!r}: it is in {place}, where vmtasks keeps disks and keys, and never goes "
                "into a guest; name another folder, or put that elsewhere with VM_DIR or VMTASKS_STORE"
            )
        return Walk(source, table.exclude, gitignore=table.gitignore, hidden=private)

    def parts(self, name: str) -> dict[str, str]:
        """What decides the suite's result, each as a short text that changes when it does."""
        suite, config = self.config.suites[name], self.config
        decides = {k: v for k, v in msgspec.structs.asdict(suite).items() if k not in {"artifacts", "timeout_s"}}
        return {
            "tree": self.tree,
            "image": self._system(),
            "suite": plan.suite_digest(decides),
            "build": plan.suite_digest(
                {"command": config.build.command, "env": config.build.env, "dest": config.sync.dest}
            ),
        }

    @cached_property
    def tree(self) -> str:
        """Digest of the tree to sync, as it was when first asked for: what is edited later is tested next time."""
        return tree_digest(self.walk(), self.config.vm_dir / "tree.json")

    def _system(self) -> str:
        """Which system the machine runs: its image, and what was done to it since."""
        record = self.state.machine(self.config.name)
        ours = record if record and record.guest == self.config.label else None
        if ours and not ours.image:
            return ours.changed
        named = read_record(self.state.snapshot_record(ours.snapshot if ours else CLEAN), PhaseRecord)
        return (named.sha256 if named else "") + (ours.changed if ours else "")


def describe(record: ResultRecord) -> str:
    """`9 passed in 4.1 s`."""
    return f"{record.counts} in {seconds(record.duration_s)}"
