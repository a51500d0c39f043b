"""The store: downloads and images by digest, published whole or not at all, one writer for each.

downloads/<sha256>           what was fetched; its name is its digest
downloads/<sha256>.json      where it came from, if it was downloaded
media/<recipe>.toml          which download an installer recipe led to
images/<digest>.<bytes>.qcow2  read-only, backed by the image before it (named relatively: the store can be moved);
                             `bytes` begins the SHA-256 of the file, so that no other bytes ever get this name
images/<digest>.<bytes>.toml its record, written last: no record, no image
images/<digest>.<bytes>.damaged  the record of an image whose bytes were found to be others
images/<digest>.partial      an image being made; whoever holds its lock may remove it
failed/<digest>.qcow2        the disk of a phase that failed, kept to look inside
locks/, accel.json, history.json
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from vmtasks.errors import ImageError, StateError
from vmtasks.host import files
from vmtasks.host.locks import Waiting, lock
from vmtasks.host.progress import History
from vmtasks.store import qcow2
from vmtasks.store.records import ImageRecord, MediaRecord, read_record, write_record

Look = Literal["time", "sample", "bytes"]
"""How thoroughly an image is checked: size and time; also its header and samples of its bytes; every byte."""

BYTES = 16
"""Digits of the SHA-256 in the name of an image file."""


class Store:
    """One store. Methods raise OSError for a full or read-only file system; nothing half-written is published."""

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        """`root` is made when first written to. `read_only`: not even a file's time is put right by a look at it."""
        self.root = root
        self.read_only = read_only

    # -- paths

    def download(self, sha256: str) -> Path:
        """The path of the download with this digest."""
        return self.root / "downloads" / sha256

    def failed(self, digest: str) -> Path:
        """The path of the kept disk of a failed phase."""
        return self.root / "failed" / f"{digest}.qcow2"

    def downloads(self) -> list[Path]:
        """All whole downloads."""
        return sorted(path for path in (self.root / "downloads").glob("*") if len(path.name) == 64 and path.is_file())

    @property
    def history(self) -> History:
        """How long each piece of work took the last time."""
        return History(self.root / "history.json")

    def image(self, record: ImageRecord) -> Path:
        """The path of the image of this record."""
        return self.root / "images" / f"{record.stem}.qcow2"

    def partial(self, digest: str) -> Path:
        """The path of the image being made for this digest: beside the others, so that its backing name stays right."""
        return self.root / "images" / f"{digest}.partial"

    def snapshot_key(self, digest: str) -> Path:
        """The path of the private key that is kept with an image of this digest."""
        return self.root / "keys" / "snapshots" / digest

    def keep_key(self, digest: str, private: Path) -> None:
        """Keep the private key that an image lets in, and its public half if that is there, with the image."""
        kept = self.snapshot_key(digest)
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for half, mode in ((".pub", 0o644), ("", 0o600)):
            path = private.with_name(private.name + half)
            if path != kept and path.is_file():
                files.write(kept.with_name(kept.name + half), files.read(path), mode)

    def drop_key(self, digest: str) -> None:
        """Remove the key that is kept with an image."""
        kept = self.snapshot_key(digest)
        for path in (kept, kept.with_name(f"{kept.name}.pub")):
            path.unlink(missing_ok=True)

    # -- images

    def made(self, digest: str) -> list[ImageRecord]:
        """The readable records of all images of this digest, newest first."""
        found = (read_record(path, ImageRecord) for path in self._images(digest, ".toml"))
        return sorted((r for r in found if r is not None and r.digest == digest), key=lambda r: -r.created)

    def _images(self, digest: str, suffix: str) -> list[Path]:
        """What lies there of the images of this digest; not by a glob, whose expression would be new each time."""
        folder = self.root / "images"
        with contextlib.suppress(OSError):
            names = sorted(os.listdir(folder))  # noqa: PTH208 - names will do
            return [folder / name for name in names if name.startswith(f"{digest}.") and name.endswith(suffix)]
        return []

    def record(self, digest: str, sha256: str) -> ImageRecord | None:
        """The record of the image with these bytes, or None."""
        for stem in (_stem(digest, sha256), digest):
            record = read_record(self.root / "images" / f"{stem}.toml", ImageRecord)
            if record is not None and (record.digest, record.sha256) == (digest, sha256):
                return record
        return None

    def find(
        self, digest: str, sha256: str = "", *, chain: str | None = None, look: Look = "time"
    ) -> tuple[ImageRecord | None, str]:
        """The record of an intact image of this digest, the newest; or None and why there is none.

        With `sha256` only the image with these bytes, and with `chain` only one on that backing chain, '' for none.
        """
        exact = self.record(digest, sha256) if sha256 else None
        made = [exact] if exact else self.made(digest)
        if not made:
            aside = any(self._images(digest, ".damaged"))
            return None, "the image was damaged" if aside else "the image is gone" if sha256 else "not built yet"
        asked = [r for r in made if sha256 in ("", r.sha256) and chain in (None, r.backing_sha256)]
        why = "" if asked else "the image was rebuilt" if sha256 else "the image below it was rebuilt"
        for record in asked:
            fault = self.fault(record, look)
            if not fault:
                return record, ""
            why = why or fault
        return None, why

    def fault(self, record: ImageRecord, look: Look = "time") -> str:
        """Why an image is invalid, or ''. Checks its whole backing chain.

        An image with other bytes than its record says loses its record, so that it is not used again.
        """
        fault = self.own_fault(record, look)
        if fault or not record.backing:
            return fault
        below = self.below(record)
        if below is None:
            gone = "was rebuilt" if self.made(record.backing) else "is gone"
            return f"the image below it, {record.backing[:12]}, {gone}"
        return self.fault(below, look)

    def own_fault(self, record: ImageRecord, look: Look) -> str:
        """As fault(), without the images below."""
        path = self.image(record)
        fault = self.file_fault(path, record, full=look == "bytes")
        if not fault and look == "sample":
            fault = self._header_fault(record) or self._sample_fault(record)
        if fault.endswith(OTHER_BYTES) and not self.read_only:
            with contextlib.suppress(OSError):
                path.with_suffix(".toml").rename(path.with_suffix(".damaged"))
        return fault

    def file_fault(self, path: Path, record: "ImageRecord | MediaRecord", *, full: bool = False) -> str:
        """As the function file_fault, of the file that a record is about."""
        return file_fault(path, record.size, record.mtime_ns, record.sha256, full=full, mend=not self.read_only)

    def below(self, record: ImageRecord) -> ImageRecord | None:
        """The record of the backing image, or None."""
        return next((r for r in self.made(record.backing) if r.chain == record.backing_sha256), None)

    def _sample_fault(self, record: ImageRecord) -> str:
        """The fault that samples show of an image whose size and time are right, or ''."""
        path = self.image(record)
        try:
            other = bool(record.sample) and qcow2.sample(path) != record.sample
        except OSError as error:
            return f"{path.name} cannot be read: {error.strerror}"
        return f"{path.name} {OTHER_BYTES}" if other else ""

    def _header_fault(self, record: ImageRecord) -> str:
        """The fault that the header of an image shows, or ''; it also names the backing file."""
        path, told = self.image(record), qcow2.header(self.image(record))
        if told is None or told.virtual_size != record.virtual_size:
            return f"{path.name} {OTHER_BYTES}"
        below = self.below(record) if record.backing else None
        backing = self.image(below).name if below else ""
        return f"{path.name} stands on {told.backing}, not on {backing}" if below and told.backing != backing else ""

    @contextlib.contextmanager
    def explaining(self, image: ImageRecord | None, hint: str) -> Iterator[None]:
        """When the block fails on a disk, check every byte of the `image` below it.

        ImageError names the damaged image and gives `hint`; if none is damaged, the original error stands.
        """
        try:
            yield
        except ImageError as error:
            fault = self.fault(image, "bytes") if image is not None else ""
            if not fault:
                raise
            raise ImageError(fault, hint=hint, log=error.log) from error

    def publish(self, digest: str, record: Callable[[os.stat_result, str], ImageRecord]) -> ImageRecord:
        """Publish the partial image of `digest`. Earlier images stay as they are.

        The data is made durable, then renamed, then the record is written: a kill at any moment leaves no image or a
        whole one. `record` gets the file's stat and SHA-256.
        """
        partial = self.partial(digest)
        partial.chmod(0o444)
        with partial.open("rb") as data:
            os.fsync(data.fileno())
        sha256 = files.sha256(partial)
        made = record(partial.stat(), sha256)
        made = msgspec.structs.replace(made, file=_stem(digest, sha256), sample=qcow2.sample(partial))
        image = self.image(made)
        partial.rename(image)
        files.sync_folder(image.parent)
        write_record(image.with_suffix(".toml"), made)
        return made

    def keep_failed(self, digest: str) -> Path:
        """Move the partial image of a failed phase to failed/; returns its path."""
        kept = self.failed(digest)
        kept.parent.mkdir(parents=True, exist_ok=True)
        self.partial(digest).rename(kept)
        return kept

    def mend(self) -> list[str]:
        """Restore the records of images that have their right bytes again; returns their names."""
        again = []
        for path in sorted((self.root / "images").glob("*.damaged")):
            record = read_record(path, ImageRecord)
            if record is not None and not file_fault(
                self.image(record), record.size, record.mtime_ns, record.sha256, full=True
            ):
                path.rename(path.with_suffix(".toml"))
                again.append(path.stem)
        return again

    def records(self) -> list[ImageRecord]:
        """All readable records, oldest first."""
        found = (read_record(path, ImageRecord) for path in sorted((self.root / "images").glob("*.toml")))
        return sorted((r for r in found if r is not None), key=lambda r: r.created)

    # -- pruned

    def drop(self, record: ImageRecord) -> None:
        """Remove an image, its record first. Only the holder of its lock may."""
        image = self.image(record)
        image.with_suffix(".toml").unlink(missing_ok=True)
        image.unlink(missing_ok=True)

    def reachable(self, named: Iterable[tuple[str, str]], stems: Iterable[str]) -> set[str]:
        """The names of all image files in use: by digest and SHA-256, by name, and as backing files of these.

        Backing files are read from both the records and the files' headers.
        """
        folder, named = self.root / "images", set(named)
        there = {path.stem for path in folder.glob("*.qcow2") if not path.name.startswith(".")}
        todo = {*stems, *(stem for stem in (_stem(*name) for name in named))}
        todo |= {digest for digest, sha256 in named if not self._is_other(digest, sha256)}
        todo |= {Path(h.backing).stem for path in folder.glob("*.partial") if (h := qcow2.header(path)) and h.backing}
        found: set[str] = set()
        while todo:
            stem = todo.pop()
            if stem in found or stem not in there:
                continue
            found.add(stem)
            told = qcow2.header(folder / f"{stem}.qcow2")
            if told is not None and told.backing:
                todo.add(Path(told.backing).stem)
            record = read_record(folder / f"{stem}.toml", ImageRecord)
            if record is not None and record.backing and (below := self.below(record)):
                todo.add(below.stem)
        return found

    def _is_other(self, digest: str, sha256: str) -> bool:
        """Whether the image named by `digest` alone, as older versions did, is known to have other bytes."""
        record = read_record(self.root / "images" / f"{digest}.toml", ImageRecord)
        return record is not None and record.sha256 != sha256

    def prune(self, needed: set[str] | None, *, dry_run: bool = False) -> list[Path]:
        """Remove images that are not in `needed`, kept disks and leftovers; returns them. None: all are needed.

        With `dry_run` nothing is removed. What is locked stays.
        """
        gone = []
        paths = (*(self.root / "images").glob("*"), *(self.root / "failed").glob("*"))
        for path in sorted(paths, key=lambda path: (path.suffix == ".qcow2", path)):  # records first
            if files.is_temporary(path.name):  # vmtasks.store.leftovers sees to these
                continue
            if path.is_dir() and not path.is_symlink():
                continue  # nothing of ours
            published = path.parent.name == "images" and path.suffix in (".damaged", ".qcow2", ".toml")
            if published and (needed is None or path.stem in needed):
                continue
            digest = path.name.partition(".")[0]
            with contextlib.suppress(StateError), self.lock(f"image-{digest}", timeout_s=0):
                if not dry_run:
                    path.unlink(missing_ok=True)
                gone.append(path)
        return gone

    # -- locks

    def lock(
        self, name: str, *, timeout_s: float, waiting: Waiting | None = None
    ) -> contextlib.AbstractContextManager[int]:
        """Lock `name` for one writer; see vmtasks.host.locks."""
        files.private_folder(self.root)
        return lock(self.root / "locks" / f"{name}.lock", name, timeout_s=timeout_s, waiting=waiting)


OTHER_BYTES = "does not have the bytes that its record says"
SECOND_NS = 10**9


def file_fault(path: Path, size: int, mtime_ns: int, sha256: str, *, full: bool = False, mend: bool = True) -> str:
    """Why `path` is not the file that was recorded, or ''. Reads it only when its time differs, or if `full`.

    One that has the right bytes gets the time that its record says, unless `mend` is false, so that it is not read
    again: a store that was copied, or restored from a cache of CI, is as good as it was.
    """
    try:
        stat = path.stat()
        if stat.st_size != size:
            return f"{path.name} has {stat.st_size} bytes, its record says {size}"
        same_time = stat.st_mtime_ns in (mtime_ns, mtime_ns // SECOND_NS * SECOND_NS)  # archives keep whole seconds
        if same_time and not full:
            return ""
        if files.sha256(path) != sha256:
            return f"{path.name} {OTHER_BYTES}"
    except FileNotFoundError:
        return f"{path.name} is gone"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    if not same_time and mend:
        with contextlib.suppress(OSError):  # a store that may not be written to
            os.utime(path, ns=(stat.st_atime_ns, mtime_ns))
    return ""


def _stem(digest: str, sha256: str) -> str:
    """The name of an image file; other bytes never get the same one."""
    return f"{digest}.{sha256[:BYTES]}"
