"""A guest's images on record: paths, records, and why an image is invalid.

Cheap to import, because doit asks at every run, even if there is nothing to do.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from vmtasks.config.arguments import Forward
from vmtasks.config.load import Config
from vmtasks.config.tables import NAME, PhaseTable
from vmtasks.errors import ConfigError, StateError
from vmtasks.host import files
from vmtasks.store.records import MediaRecord, load_record, read_record
from vmtasks.store.store import Store

CLEAN, MANUAL = "clean", "manual"
"""The name of the phases' last image, and the snapshot of a machine that was installed by hand."""

if TYPE_CHECKING:
    from vmtasks.qemu.accel import Accel


class PhaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a build step, for the next one: the digests of its image's inputs and bytes.

    `parts` are those of the step's node in the plan; records of older versions have none.
    """

    digest: str
    sha256: str
    parts: dict[str, str] = {}


class RenderRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The sources of a rendered phase, as `parts` of the node `digest`, and its files.

    `files`: the plan's digest of each file, rendered with the placeholder for the public key. `key`: the public key in
    the written files. `left`: SHA-256 of each file as written.
    """

    digest: str
    parts: dict[str, str]
    files: dict[str, str]
    key: str
    left: dict[str, str]


class IsoRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a phase's ISO, its public key, and the size and time of the file as written."""

    digest: str
    parts: dict[str, str]
    key: str
    size: int
    mtime_ns: int


class BuiltRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The sources of the image `digest`: digests by part, and their texts, to name the changed line.

    Lies beside the phase's record, and belongs to this project alone.
    """

    digest: str
    sources: dict[str, str]
    texts: dict[str, str]


class BindRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A folder of this host bound into a machine. `how` is `9p` or `rsync`; empty before the guest was asked.

    `exclude`: rsync patterns of files left out in both directions. `copied`: why 9p is not used even if it is there.
    """

    host: str
    guest: str
    read_only: bool = False
    how: str = ""
    exclude: list[str] = []
    copied: str = ""


class MachineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a machine. `pid` 0: it was stopped cleanly. `memory` and `disk_size` in bytes.

    `image` is empty for a machine installed by hand. `changed` is a new text after each change of the system that the
    image does not show: installed by hand, provisioned. `own`: made by `vmtasks run`, so that it has its own settings
    instead of the project's. `key` is the login key: `build` the image's, `own` the machine's, `changing` either.
    `identity` says whose SSH host keys it shows: those of its `image`, its `own`, `changing` either; `shared`: those of
    its image permanently. `mac` is empty for a machine made before machines had their own addresses. `want_port` and
    `want_forwards` were requested, `ssh_port` and `forwards` assigned at the last start. `owner`: the process whose end
    removes it. `lease_until`: when it is removed, in seconds since 1970, unless renewed; 0: never. `throwaway`: it is
    removed when it stops.
    """

    name: str
    guest: str
    snapshot: str
    image: str
    image_sha256: str
    ssh_user: str
    host_keys: list[str]
    pid: int = 0
    pid_started: str = ""
    ssh_port: int = 0
    memory: int = 0
    cpus: int = 0
    accel: str = ""
    network: str = ""
    started: float = 0.0
    changed: str = ""
    family: str = ""
    version: str = ""
    own: bool = False
    throwaway: bool = False
    owner: int = 0
    owner_started: str = ""
    lease_until: float = 0.0
    key: Literal["build", "changing", "own"] = "build"
    identity: Literal["image", "changing", "own", "shared"] = "image"
    mac: str = ""
    authorized: list[str] = []
    login: str = ""
    disk_size: int = 0
    want_port: int = 0
    forwards: list[str] = []
    want_forwards: list[str] = []
    binds: list[BindRecord] = []
    created: float = 0.0
    ready: bool = False

    def __post_init__(self) -> None:
        """ValueError for numbers out of range: the record is damaged."""
        try:
            forwards = [Forward.parse(text) for text in self.forwards]
        except ConfigError as error:
            raise ValueError(error.message) from None
        if min(self.pid, self.owner) < 0 or not all(0 <= n <= 65535 for n in (self.ssh_port, self.want_port)):
            raise ValueError(f"pid, owner or port out of range; forwards {forwards}")


class Workspace:
    """One guest's folder of records, and the store that they refer to."""

    def __init__(self, config: Config, *, read_only: bool = False) -> None:
        """`home` is the guest's folder of records and phase ISOs. `read_only`: see Store."""
        self.config = config
        self.home = config.guest_state
        self.store = Store(config.store_dir, read_only=read_only)

    # -- places

    @property
    def installer_record(self) -> Path:
        """Target of `fetch`."""
        return self.home / "installer.toml"

    @property
    def clean_record(self) -> Path:
        """Target of `snapshot`: the image that machines start from."""
        return self.home / "clean.toml"

    @property
    def key(self) -> Path:
        """The user's private key; its public half is beside it with `.pub`."""
        return self.store.root / "keys" / "id_ed25519"

    @property
    def public_key(self) -> Path:
        """The user's public key."""
        return self.key.with_suffix(".pub")

    def snapshot_key(self, digest: str) -> Path:
        """The path of the private key that the image `digest` accepts; the file may be missing."""
        return self.store.snapshot_key(digest)

    def folder(self, number: int) -> Path:
        """Rendered files of phase `number` (from 1)."""
        return self.home / f"phase-{number}"

    def iso(self, number: int) -> Path:
        """ISO of phase `number`."""
        return self.home / f"phase-{number}.iso"

    def look_disk(self, number: int) -> Path:
        """The throw-away copy of a disk that `look:N` boots; it exists only meanwhile, or after a kill."""
        return self.home / f"look-{number}.qcow2"

    def record(self, number: int) -> Path:
        """Record of phase `number`; that of number 0 is the installer's."""
        return self.home / f"phase-{number}.toml" if number else self.installer_record

    def log(self, number: int) -> Path:
        """Console log of the last boot of phase `number`."""
        return self.home / "logs" / f"{self.phase(number).name}.console.log"

    def snapshot_record(self, name: str) -> Path:
        """The record that names the image of the snapshot `name`. ConfigError for an invalid name."""
        if not re.fullmatch(NAME, name):
            raise ConfigError(f"{name!r} is no name for a snapshot; use letters, digits, '.', '_' and '-'")
        return self.home / ("clean.toml" if name == CLEAN else f"snapshots/{name}.toml")

    def machine_folder(self, name: str) -> Path:
        """The folder of the machine `name`."""
        return self.config.vm_dir / "run" / name

    def phase(self, number: int) -> PhaseTable:
        """Phase `number` as guest.toml has it."""
        return self.config.guest.phases[number - 1]

    @cached_property
    def accel(self) -> "Accel":
        """The accelerator that works here; probed once for each boot of the host."""
        from vmtasks.qemu.accel import probe  # noqa: PLC0415 - 5 ms that most runs have no use for

        files.private_folder(self.store.root)
        return probe(self.store.root / "accel.json", want=self.config.accel)

    # -- records

    def installer(self) -> Path:
        """The installer's ISO in the store. StateError before `fetch`."""
        return self.store.download(self.media().sha256)

    def recipe(self) -> tuple[str, dict[str, str]]:
        """The installer's recipe: the digest of its parts, as in its record, and the parts.

        OSError, ImageError for an invalid overlay.
        """
        from vmtasks.installer.installer import recipe  # noqa: PLC0415 - it stands above most of what is cheap

        return recipe(self.config)

    def media_fault(self, media: MediaRecord) -> str:
        """Why the store lacks what this record names, the phases' packages included, or ''."""
        for items in media.local_packages.values():
            for sha256, _, name in (item.partition(" ") for item in items):
                if not self.store.download(sha256).is_file():
                    return f"the package {name} is gone"
        return self.store.file_fault(self.store.download(media.sha256), media)

    def image_fault(self, record: Path) -> str:
        """Why the image that `record` names is invalid, or ''."""
        named = read_record(record, PhaseRecord)
        if named is None:
            return f"there is no record {record.name}"
        return self.store.find(named.digest, named.sha256)[1]

    def machine(self, name: str) -> MachineRecord | None:
        """The record of the machine `name`; None if there is none or it is unreadable."""
        return read_record(self.machine_folder(name) / "machine.toml", MachineRecord)

    def machine_fault(self, name: str) -> str:
        """Why the record of the machine `name` is unreadable, or ''; also '' if there is no machine."""
        folder = self.machine_folder(name)
        try:
            load_record(folder / "machine.toml", MachineRecord)
        except (FileNotFoundError, NotADirectoryError):
            return "it is gone" if any(not other.startswith(".") for other in _names(folder)) else ""
        except OSError as error:
            return error.strerror or str(error)
        except ValueError as error:
            return str(error).partition("\n")[0]
        return ""

    def machine_names(self) -> list[str]:
        """The names of all machines, sorted; also of those with an unreadable record."""
        names = [name for name in _names(self.config.vm_dir / "run") if not name.startswith(".")]
        return [name for name in names if self.machine(name) is not None or self.machine_fault(name)]

    def on_clean(self, name: str) -> bool:
        """Whether the machine `name` is, or would be, on the phases' image, not on a snapshot or installed by hand."""
        record = self.machine(name)
        return record is None or record.guest != self.config.label or record.snapshot == CLEAN

    def media(self) -> MediaRecord:
        """The installer's record. StateError before `fetch`."""
        record = read_record(self.installer_record, MediaRecord)
        if record is None:
            raise StateError(f"there is no usable record {self.installer_record}", hint="doit fetch")
        return record

    def phase_record(self, number: int) -> PhaseRecord:
        """The record of phase `number`. StateError before it was built."""
        record = read_record(self.record(number), PhaseRecord)
        if record is None:
            raise StateError(f"there is no usable record {self.record(number)}", hint=f"doit phase:{number}")
        return record


def _names(folder: Path) -> list[str]:
    """The names in the folder, sorted; [] if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []
