"""PURE: what each build step depends on, as digests chained from the installer to the last phase.

A phase's digest says what its image is made from, never how fast: memory, CPUs and the accelerator are not in it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

import msgspec

from vmtasks.config.tables import Exchange, HardwareTable, PhaseTable

FORMAT = 1
"""Raised when the meaning of a digest changes, so that no old image is taken for a new one."""


class IsoFile(msgspec.Struct, frozen=True, order=True):
    """A file on a phase ISO, as the guest will see it."""

    path: str
    mode: int
    sha256: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest notices of its machine. Two machines with equal facts make the same image."""

    boot: str
    cds: tuple[str, ...]
    cd_bus: str
    dialogue: tuple[tuple[str, str], ...]
    disk_bus: str
    disk_serial: str
    disk_size: int
    machine_type: str
    nic: str
    rng: bool


def facts(hardware: HardwareTable, phase: PhaseTable, dialogue: Iterable[Exchange], disk_size: int) -> Facts:
    """Collect a phase's facts from its guest.toml. `disk_size` in bytes."""
    return Facts(
        boot=phase.boot,
        cds=tuple(phase.cds),
        cd_bus=hardware.cd_bus,
        dialogue=tuple((e.expect, e.send) for e in dialogue),
        disk_bus=hardware.disk_bus,
        disk_serial=hardware.disk_serial,
        disk_size=disk_size,
        machine_type=hardware.type,
        nic=hardware.nic,
        rng=hardware.rng,
    )


def files_digest(files: Iterable[IsoFile]) -> str:
    """SHA-256 (hex) over names, modes and contents, in the order of names."""
    return _sha256([[f.path, f.mode, f.sha256] for f in sorted(files)])


def token(files: Iterable[IsoFile]) -> str:
    """What makes a sentinel line on the console ours: unknown to a script that is echoed, new when a file is."""
    return _sha256(["token", files_digest(files)])[:16]


def phase_digest(before: str, files: Iterable[IsoFile], machine: Facts) -> str:
    """Digest of the image that a phase makes.

    `before` is the digest of the image before it, or of the installer for the first.
    """
    return _sha256([FORMAT, before, files_digest(files), msgspec.structs.asdict(machine)])


def suite_digest(parts: Mapping[str, object]) -> str:
    """Digest of everything that decides a suite's result: tree, image, command, user, environment, build."""
    return _sha256([FORMAT, "suite", dict(parts)])


def _sha256(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
