"""A phase on real QEMU with a guest of one boot sector, and the account of how it went."""

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bootsector import ask, say, wait_key
from vmtasks.config.tables import Exchange, FailureText
from vmtasks.errors import PhaseError
from vmtasks.images.judge import CAUSES, Limits, Phase
from vmtasks.qemu import argv, vm
from vmtasks.qemu.argv import Spec
from vmtasks.qemu.console import ScriptReport

needs_qemu = pytest.mark.skipif(not shutil.which(argv.PROGRAM), reason="QEMU is not installed")

TOKEN = "0123456789abcdef"  # noqa: S105
KEY = "ssh-ed25519 AAAAC3Nza+/="
BRIEF = Limits(total_s=15.0, silence_s=5.0, poweroff_s=5.0)
BOUND_S = 12.0
"""No phase may take longer, whatever happens to it."""

FAILURES = [
    FailureText(expect="(?m)^panic: |Kernel panic", cause="panic", says="panicked"),
    FailureText(expect=r"(?m)^boot: $", cause="loader", says="stopped at the boot loader's prompt"),
    FailureText(expect="(?m)login: $", cause="login", says="booted to its login prompt"),
    FailureText(expect="single-user", cause="single-user", says="went to single-user mode"),
    FailureText(expect="mountroot> $", cause="mountroot", says="did not find its root"),
    FailureText(expect="db> $", cause="debugger", says="stopped in its debugger"),
]
TALK = [
    Exchange(expect=r"Booting in \d+ seconds", send="9", timeout_s=5),
    Exchange(expect="(?m)^OK $", send="set console=comconsole\r", timeout_s=5),
    Exchange(expect="(?m)^OK $", send="boot\r", timeout_s=5),
]
LOADER = say("Booting in 9 seconds\r\n") + wait_key("9") + ask("OK ", "set console=comconsole") + ask("OK ", "boot")


@dataclass
class Went:
    """How a phase went."""

    error: PhaseError | None = None
    host_keys: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    pid: int = 0
    took_s: float = 0.0
    log: str = ""


def machine(folder: Path, image: bytes, **changes: Any) -> Spec:
    raw, disk = folder / "disk.raw", folder / "disk.qcow2"
    raw.write_bytes(image.ljust(1 << 20, b"\0"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, changes.get("disk", disk)], check=True)
    values: dict[str, Any] = {
        "name": "test", "accel": "tcg", "cpu": "max", "machine_type": "pc", "memory": 16 << 20, "cpus": 1, "disk": disk,
        "disk_bus": "virtio-blk", "disk_serial": "x", "nic": "virtio-net-pci", "rng": False, "throwaway": True,
        "console_log": folder / "console.log", "firmware_log": folder / "firmware.log",
    }  # fmt: skip
    with vm.temporary_sockets() as sockets:
        pass
    sockets.mkdir(mode=0o700)
    return Spec(**{**values, "console_socket": sockets / "c", "qmp_socket": sockets / "q", **changes})


@contextmanager
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Went]]:
    """Give what runs a phase and checks that it ends in time and leaves no QEMU."""
    folders: list[Path] = []
    monkeypatch.setattr("vmtasks.images.judge.PANIC_LINES_S", 0.3)

    def boot(
        image: bytes,
        *,
        limits: Limits = BRIEF,
        talk: list[Exchange] | None = None,
        failures: list[FailureText] = FAILURES,
        meanwhile: Callable[[Went], object] | None = None,
        after: str = "",
        **changes: Any,
    ) -> Went:
        """Run a phase; `meanwhile` is called when the step `after` was heard, or at once."""
        spec, went = machine(tmp_path, image, **changes), Went()
        folders.append(spec.qmp_socket.parent)
        began = time.monotonic()

        def on_step(title: str) -> None:
            went.steps.append(title)
            if meanwhile is not None and title == after:
                threading.Timer(0.2, meanwhile, [went]).start()

        try:
            with vm.boot(spec, tmp_path / "qemu.log") as booted:
                went.pid = booted.process.pid
                if meanwhile is not None and not after:
                    threading.Timer(0.2, meanwhile, [went]).start()
                run = Phase(
                    title="phase 1-test",
                    booted=booted,
                    limits=limits,
                    dialogue=talk or [],
                    failures=failures,
                    firmware_log=spec.firmware_log,
                    said=ScriptReport(TOKEN, on_step),
                )
                went.host_keys = run.run()
        except PhaseError as error:
            went.error = error
        went.took_s = time.monotonic() - began
        went.log = spec.console_log.read_text(errors="replace")
        assert not Path(f"/proc/{went.pid}").exists(), "QEMU is left over"
        assert went.took_s < BOUND_S
        return went

    yield boot
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def failed(went: Went, cause: str, sentence: str, *, last: str | None = None) -> None:
    """Check the account of a failure; `last` is the last line of the console that it shows."""
    assert went.error is not None, "it was believed"
    assert cause in CAUSES
    assert (went.error.cause, went.error.message) == (cause, f"phase 1-test: {sentence}")
    if last is not None:
        assert went.error.console[-1:] == ((last,) if last else ())
