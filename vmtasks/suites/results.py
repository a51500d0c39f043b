"""The suites' last results, each with the digests of its inputs; and why a result is stale."""

import shutil
import time
from functools import cached_property
from pathlib import Path

import msgspec

from vmtasks.config.load import Config
from vmtasks.errors import ConfigError
from vmtasks.guest.tree import Walk, tree_digest
from vmtasks.host import files
from vmtasks.host.progress import seconds
from vmtasks.images import plan
from vmtasks.images.private import Private
from vmtasks.images.workspace import CLEAN, PhaseRecord, Workspace
from vmtasks.store.records import read_record, write_record

BUILD = "_build"
"""The name of the result of a failed or unfinished build. No suite has this name."""
LOG = "output.log"
NOT_OVER = "the run has not ended: it goes on, or it was killed, or this host went down"


class ResultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a suite's last run ended. `status` is its exit status; `counts` and `trouble` are for messages.

    `timed_out`: it was ended at its deadline. `left`: why artifacts were not fetched.
    """

    key: str
    status: int
    counts: str
    duration_s: float
    finished: float
    parts: dict[str, str] = {}
    timed_out: bool = False
    trouble: str = ""
    left: list[str] = []


class Results:
    """The results of one project."""

    def __init__(self, config: Config, *, read_only: bool = False) -> None:
        """Reads nothing yet. `read_only`: digests of the tree's files are not saved."""
        self.config = config
        self.state = Workspace(config, read_only=read_only)
        self.read_only = read_only
        self.folder = config.vm_dir / "results"
        self.stale: set[str] = set()
        """Suites that why_stale() found stale."""

    def xml(self, name: str) -> Path:
        """JUnit result of a suite."""
        return self.folder / f"{name}.xml"

    def record(self, name: str) -> Path:
        """The file of the suite's last result."""
        return self.folder / f"{name}.toml"

    # -- the last result

    def last(self, name: str) -> ResultRecord | None:
        """The suite's last result, passed or failed."""
        return read_record(self.record(name), ResultRecord)

    def why_stale(self, name: str) -> str:
        """Why the suite must run, or '' if its last result is up to date."""
        reason = self.cause(name)
        if reason:
            self.stale.add(name)
        return reason

    def cause(self, name: str, image: str | None = None) -> str:
        """As why_stale(), for a machine with the system `image`; None: its present one."""
        last = self.last(name)
        if last is None or not self.xml(name).is_file():
            return "it has not run yet"
        if last.status != 0:
            return f"it failed the last time ({last.trouble or last.counts})"
        parts = self.former_parts(name) if "suite" in last.parts else self.parts(name)
        parts = parts if image is None else {**parts, "image": image}
        changed = plan.changes(last.parts, parts)
        return f"changed: {', '.join(changed)}" if changed else ""

    # -- the next one

    def begin(self, name: str) -> Path:
        """Remove the suite's last result, and return the empty folder for the next run.

        The new result says that the run has not ended, which stays true if the run is killed.
        """
        self.forget(name)
        folder = self.folder / name
        folder.mkdir(parents=True)
        self.broken(name, NOT_OVER)
        return folder

    def forget(self, name: str) -> None:
        """Remove the suite's last result. The record goes first: without it no result is up to date."""
        self.record(name).unlink(missing_ok=True)
        self.xml(name).unlink(missing_ok=True)
        folder = self.folder / name
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)

    def publish(self, name: str, xml: bytes, record: ResultRecord) -> None:
        """Write the suite's result: the record last."""
        self.record(name).unlink(missing_ok=True)
        files.write(self.xml(name), xml)
        write_record(self.record(name), record)

    def broken(self, name: str, why: str, output: str = "") -> None:
        """Write a result that says why the suite's end is unknown."""
        from vmtasks.suites import junit  # noqa: PLC0415 - start-up time

        fmt = self.config.suites[name].format if name in self.config.suites else "plain"
        made = junit.report(name, output, ended=None, duration_s=0, fmt=fmt, own_xml=None, problem=why)
        record = ResultRecord(
            key="",
            status=255,
            counts=str(made.counts),
            duration_s=0,
            finished=round(time.time(), 1),
            trouble=why,
        )
        self.publish(name, made.xml, record)

    # -- inputs

    def source(self) -> Path:
        """The tree to sync."""
        return self.config.root / self.config.sync.source

    def walk(self) -> Walk:
        """A walk of the tree to sync. ConfigError if it lies in a place that never goes into a guest."""
        private, source, table = Private(self.config), self.source(), self.config.sync
        place = private.around(source)
        if place is not None:
            raise ConfigError(
                f"sync.source = {table.source!r}: it is in {place}, where vmtasks keeps disks and keys, and never goes "
                "into a guest; name another folder, or put that elsewhere with VM_DIR or VMTASKS_STORE"
            )
        return Walk(source, table.exclude, gitignore=table.gitignore, hidden=private)

    def parts(self, name: str) -> dict[str, str]:
        """The inputs of the suite's result: the parts of its node in the plan."""
        return {**plan.build_parts(self.config, self.tree, self.system()), **plan.suite_parts(self.config.suites[name])}

    def former_parts(self, name: str) -> dict[str, str]:
        """The same inputs in the form of older versions' results."""
        suite = msgspec.structs.asdict(self.config.suites[name])
        decides = {key: value for key, value in suite.items() if not key.startswith("artifacts") and key != "timeout_s"}
        return {
            "tree": self.tree,
            "image": self.system(),
            "suite": plan.suite_digest(decides),
            "build": self.built,
        }

    @cached_property
    def tree(self) -> str:
        """Digest of the tree to sync at the first call: later edits are tested in the next run."""
        return tree_digest(self.walk(), self.config.vm_dir / "tree.json", keep=not self.read_only)

    @property
    def built(self) -> str:
        """Digest of the build's command, environment and place."""
        table = self.config.build
        return plan.suite_digest({"command": table.command, "env": table.env, "dest": self.config.sync.dest})

    @property
    def where(self) -> str:
        """Digest of the tree's source and its place in the machine."""
        table = self.config.sync
        return plan.suite_digest(
            {
                "source": str(self.source().resolve()),
                "exclude": table.exclude,
                "gitignore": table.gitignore,
                "dest": table.dest,
            }
        )

    def system(self, clean: str | None = None) -> str:
        """The machine's system: its image, and the changes made to it since.

        `clean`: digest of the bytes of the phases' future last image; None: of the recorded one.
        """
        record = self.state.machine(self.config.name)
        ours = record if record and record.guest == self.config.label else None
        if ours and not ours.image:
            return ours.changed
        snapshot = ours.snapshot if ours else CLEAN
        named = read_record(self.state.snapshot_record(snapshot), PhaseRecord)
        image = clean if clean is not None and snapshot == CLEAN else named.sha256 if named else ""
        return image + (ours.changed if ours else "")


def describe(record: ResultRecord) -> str:
    """`9 passed in 4.1 s`."""
    return f"{record.counts} in {seconds(record.duration_s)}"
