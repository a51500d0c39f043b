"""The store: downloads and images by digest, published whole or not at all, one writer for each.

downloads/<sha256>           what was fetched; its name is its digest
downloads/<sha256>.json      where it came from, if it was downloaded
media/<recipe>.toml          which download an installer recipe led to
images/<digest>.qcow2        read-only, backed by the image before it (named relatively: the store can be moved)
images/<digest>.toml         its record, written last: no record, no image
images/<digest>.partial      an image being made; whoever holds its lock may remove it
failed/<digest>.qcow2        the disk of a phase that failed, kept to look inside
locks/, accel.json, history.json
"""

import contextlib
import hashlib
import os
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from vmtasks import atomic
from vmtasks.errors import StateError
from vmtasks.lock import Waiting, lock
from vmtasks.progress import History

R = TypeVar("R", bound=msgspec.Struct)


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a published image. Sizes in bytes, times in seconds since 1970 or of duration."""

    digest: str
    guest: str
    version: str
    name: str
    size: int
    mtime_ns: int
    sha256: str
    virtual_size: int
    backing: str = ""
    backing_sha256: str = ""
    ssh_user: str = ""
    host_keys: list[str] = []
    created: float = 0.0
    duration_s: float = 0.0
    accel: str = ""
    qemu: str = ""

    @property
    def chain(self) -> str:
        """Digest of this image's bytes and of all that it stands on; a child's record holds it as `backing_sha256`."""
        own_and_below = f"{self.sha256} {self.backing_sha256}"
        return hashlib.sha256(own_and_below.encode()).hexdigest() if self.backing else self.sha256


class MediaRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An installer: the ISO's digest and size, where it came from, and the packages that it was composed of.

    `verified` says what it was held against; empty: nothing was known, and the user allowed that.
    """

    sha256: str
    size: int
    mtime_ns: int
    origin: str
    recipe: str
    packages: list[str] = []
    local_packages: dict[str, list[str]] = {}
    verified: str = ""


class Store:
    """One store. Methods raise OSError for a full or read-only file system; nothing half-written is published."""

    def __init__(self, root: Path) -> None:
        """`root` is made when first written to."""
        self.root = root

    # -- paths

    def download(self, sha256: str) -> Path:
        """Where the file with this digest is, if it is."""
        return self.root / "downloads" / sha256

    def failed(self, digest: str) -> Path:
        """Where the disk of a failed phase is kept."""
        return self.root / "failed" / f"{digest}.qcow2"

    @property
    def history(self) -> History:
        """How long each piece of work took the last time."""
        return History(self.root / "history.json")

    def image(self, digest: str) -> Path:
        """Where the image with this digest is, if it is."""
        return self.root / "images" / f"{digest}.qcow2"

    def partial(self, digest: str) -> Path:
        """Where the image with this digest is being made. Beside the others, so that its backing name stays right."""
        return self.root / "images" / f"{digest}.partial"

    def snapshot_key(self, digest: str) -> Path:
        """Where the private key is that lets in to an image of a machine with a key of its own, if it is one."""
        return self.root / "keys" / "snapshots" / digest

    # -- images

    def record(self, digest: str) -> ImageRecord | None:
        """The record of a published image; None when there is none that can be read."""
        return read_record(self.root / "images" / f"{digest}.toml", ImageRecord)

    def find(self, digest: str, *, full: bool = False) -> tuple[ImageRecord | None, str]:
        """The record of an intact image, or None and why not. `full` reads every byte."""
        record = self.record(digest)
        if record is None:
            return None, "not built yet"
        reason = self.fault(record, full=full)
        return (None, reason) if reason else (record, "")

    def fault(self, record: ImageRecord, *, full: bool = False) -> str:
        """Why an image cannot be believed; empty when it can. Looks at the whole chain of images below it."""
        path = self.image(record.digest)
        fault = file_fault(path, record.size, record.mtime_ns, record.sha256 if full else "")
        if fault or not record.backing:
            return fault
        below = self.record(record.backing)
        if below is None:
            return f"the image below it, {record.backing[:12]}, is gone"
        if below.chain != record.backing_sha256:
            return f"the image below it, {record.backing[:12]}, was built anew"
        return self.fault(below, full=full)

    def publish(self, digest: str, record: Callable[[os.stat_result, str], ImageRecord]) -> ImageRecord:
        """Turn the partial image of `digest` into a published one.

        The data is made durable, then named, then the record is written: a kill at any moment leaves either no image
        or a whole one. `record` is given the file's stat and SHA-256.
        """
        partial, image = self.partial(digest), self.image(digest)
        partial.chmod(0o444)
        with partial.open("rb") as data:
            os.fsync(data.fileno())
            sha256 = hashlib.file_digest(data, "sha256").hexdigest()
        partial.rename(image)
        atomic.sync_folder(image.parent)
        made = record(image.stat(), sha256)
        write_record(self.root / "images" / f"{digest}.toml", made)
        return made

    def keep_failed(self, digest: str) -> Path:
        """Move the partial image of a failed phase to where it can be looked at."""
        kept = self.failed(digest)
        kept.parent.mkdir(parents=True, exist_ok=True)
        self.partial(digest).rename(kept)
        return kept

    def drop(self, digest: str) -> None:
        """Remove an image that is not to be believed: its record first."""
        for path in (self.root / "images" / f"{digest}.toml", self.image(digest), self.partial(digest)):
            path.unlink(missing_ok=True)

    def records(self) -> list[ImageRecord]:
        """All readable records, oldest first."""
        found = (read_record(path, ImageRecord) for path in sorted((self.root / "images").glob("*.toml")))
        return sorted((r for r in found if r is not None), key=lambda r: r.created)

    def prune(self, keep: Iterable[str]) -> list[Path]:
        """Remove images that are neither in `keep` nor below one that is, kept disks and leftovers. Returns them."""
        wanted: set[str] = set()
        for digest in keep:
            at: str = digest
            while at and at not in wanted:
                wanted.add(at)
                record = self.record(at)
                at = record.backing if record else ""
        gone = []
        for path in (*(self.root / "images").glob("*"), *(self.root / "failed").glob("*")):
            if atomic.is_temporary(path.name):  # vmtasks.leftovers sees to these
                continue
            digest = path.name.partition(".")[0]
            if path.parent.name == "images" and digest in wanted and path.name in (f"{digest}.qcow2", f"{digest}.toml"):
                continue
            with contextlib.suppress(StateError), self.lock(f"image-{digest}", timeout_s=0):
                path.unlink(missing_ok=True)
                gone.append(path)
        return gone

    # -- locks

    def lock(
        self, name: str, *, timeout_s: float, waiting: Waiting | None = None
    ) -> contextlib.AbstractContextManager[int]:
        """Be the only writer of `name`; see vmtasks.lock."""
        return lock(self.root / "locks" / f"{name}.lock", name, timeout_s=timeout_s, waiting=waiting)


def file_fault(path: Path, size: int, mtime_ns: int, sha256: str = "") -> str:
    """Why `path` is not the file that was recorded; empty when it is. Reads it only when `sha256` is given."""
    try:
        stat = path.stat()
    except OSError:
        return f"{path.name} is gone"
    if stat.st_size != size:
        return f"{path.name} has {stat.st_size} bytes, its record says {size}"
    if sha256:
        with path.open("rb") as data:
            if hashlib.file_digest(data, "sha256").hexdigest() != sha256:
                return f"{path.name} does not have the SHA-256 that its record says"
    elif stat.st_mtime_ns != mtime_ns:
        return f"{path.name} was changed since it was published"
    return ""


def read_record(path: Path, kind: type[R]) -> R | None:
    """A record as it was written; None when it is absent, damaged or of another format."""
    try:
        return load_record(path, kind)
    except (OSError, ValueError):
        return None


def load_record(path: Path, kind: type[R]) -> R:
    """A record as it was written. OSError when it cannot be read, ValueError when it is damaged."""
    return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), kind)


def write_record(path: Path, record: msgspec.Struct) -> None:
    """Publish a record: whole or not at all."""
    import tomli_w  # noqa: PLC0415

    atomic.write(path, tomli_w.dumps(msgspec.to_builtins(record)))
