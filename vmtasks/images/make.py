"""Make one image: boot its phase on a partial disk, then publish the image, or keep the failed disk."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vmtasks.config.load import Config
from vmtasks.config.tables import PhaseTable
from vmtasks.errors import PhaseError, VmTasksError, note_failure
from vmtasks.host import files, process, progress
from vmtasks.images.judge import Limits, Phase
from vmtasks.media import disk
from vmtasks.qemu import hardware, vm
from vmtasks.qemu.accel import Accel
from vmtasks.qemu.argv import Spec, command, on_terminal
from vmtasks.qemu.console import ScriptReport
from vmtasks.store.records import ImageRecord
from vmtasks.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Job:
    """An image to make. `below` is its backing image; `isos` has `installer` and `phase`.

    `parts` are those of its node in the plan. The image accepts the private key `key`.
    """

    config: Config
    store: Store
    accel: Accel
    phase: PhaseTable
    number: int
    digest: str
    token: str
    isos: dict[str, Path]
    below: ImageRecord | None
    parts: dict[str, str]
    key: Path

    @property
    def title(self) -> str:
        """`phase 1-install of tiny`."""
        return f"phase {self.phase.name} of {self.config.label}"

    @property
    def logs(self) -> Path:
        """Folder of the console logs and the journal of boots."""
        return self.config.guest_state / "logs"

    @property
    def console_log(self) -> Path:
        """Console log of this phase's last boot; that of the boot before ends in `.1`."""
        return self.logs / f"{self.phase.name}.console.log"


def make(job: Job, lock: int) -> ImageRecord:
    """Boot the phase and publish its image. PhaseError if the guest fails; its disk is kept.

    `lock` is the descriptor of the image's lock: QEMU inherits it, so that no other run begins while QEMU lives.
    """
    partial = job.store.partial(job.digest)
    partial.unlink(missing_ok=True)
    if job.below is None:
        disk.create(partial, job.config.disk_size)
    else:
        disk.overlay(partial, job.store.image(job.below), relative=True)
    history = job.store.history
    try:
        with progress.step(job.title, expected_s=history.expected_s(job.title)) as step:
            host_keys = _boot(job, partial, lock, step)
            disk.check(partial)
    except VmTasksError as error:
        raise _kept(job, error) from error
    except BaseException as error:
        note_failure(error, lambda: partial.unlink(missing_ok=True), f"{partial} could not be removed")
        raise
    history.record(job.title, step.elapsed_s)
    return _publish(job, host_keys, step.elapsed_s)


def spec(job: Job, partial: Path, sockets: Path, firmware: Path | None) -> Spec:
    """The machine that the phase boots on."""
    return hardware.spec(
        job.config,
        job.accel,
        name=f"{job.config.label}-{job.phase.name}",
        disk=partial,
        cds=tuple(job.isos[cd] for cd in job.phase.cds),
        boot=job.phase.boot,
        console_socket=sockets / "console",
        console_log=job.console_log,
        qmp_socket=sockets / "qmp",
        firmware_log=firmware,
        throwaway=True,
    )


def _boot(job: Job, partial: Path, lock: int, step: progress.Step) -> list[str]:
    """Boot the phase once; returns the host keys that the guest reported."""
    job.logs.mkdir(parents=True, exist_ok=True)
    firmware = job.logs / f"{job.phase.name}.firmware.log"
    screen = job.console_log.with_suffix(".png")
    screen.unlink(missing_ok=True)
    for old in (job.console_log, firmware):
        if old.exists():
            old.replace(old.with_name(old.name + ".1"))
    limits = Limits.of(job.phase, job.accel.factor)
    progress.say(f"{job.title}: {limits}")
    with vm.temporary_sockets() as sockets:
        machine = spec(job, partial, sockets, firmware)
        _note(job, machine)
        step.now(f"boot ({job.accel.name})")
        with vm.boot(machine, job.logs / f"{job.phase.name}.qemu.log", pass_fds=[lock]) as booted:
            run = Phase(
                title=job.title,
                booted=booted,
                limits=limits,
                dialogue=job.config.guest.dialogue.get(job.phase.dialogue, []),
                failures=job.config.guest.failures,
                firmware_log=firmware,
                said=ScriptReport(job.token, step.now),
            )
            try:
                return run.run()
            except PhaseError:
                with suppress(VmTasksError):
                    booted.control.screenshot(screen)
                raise


def _note(job: Job, machine: Spec) -> None:
    """Append the command line to the journal of boots, which is never truncated."""
    when = time.strftime("%Y-%m-%dT%H:%M:%S")
    with (job.logs / "boots.log").open("a") as journal:
        journal.write(f"{when} {job.phase.name} {job.digest} {process.quote(command(machine))}\n")


def _publish(job: Job, host_keys: Sequence[str], took_s: float) -> ImageRecord:
    below = job.below
    job.store.keep_key(job.digest, job.key)
    virtual = int(disk.info(job.store.partial(job.digest))["virtual-size"])
    return job.store.publish(
        job.digest,
        lambda stat, sha256: ImageRecord(
            digest=job.digest,
            guest=job.config.guest.name,
            version=job.config.version,
            name=job.phase.name,
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            sha256=sha256,
            virtual_size=virtual,
            backing=below.digest if below else "",
            backing_sha256=below.chain if below else "",
            ssh_user=job.config.guest.ssh.user,
            host_keys=list(host_keys) or (below.host_keys if below else []),
            created=round(time.time(), 3),
            duration_s=round(took_s, 1),
            accel=job.accel.name,
            parts=job.parts,
        ),
    )


def _kept(job: Job, error: VmTasksError) -> VmTasksError:
    """Keep the failed disk with a script that boots it; returns the error with its log, and a hint that names both."""
    log = job.console_log if job.console_log.exists() else error.log
    partial = job.store.partial(job.digest)
    if not partial.exists():
        return error.replace(log=log)
    if isinstance(error, PhaseError) and error.cause == "host-disk":
        # The disk says nothing about the guest, and fills the file system.
        note_failure(error, partial.unlink, f"{partial} could not be removed")
        return error.replace(
            log=log, hint="free some space, or put the store elsewhere with VMTASKS_STORE=/path (or store=)"
        )
    try:
        look = _look(job)
    except (OSError, VmTasksError) as trouble:
        error.add_note(f"the disk could not be kept: {trouble}")
        return error.replace(log=log)
    screen = job.console_log.with_suffix(".png")
    seen = f"; its screen: {screen}" if screen.exists() else ""
    inside = f"look inside with {look} (or {look} boot); the kept disk stays as it is{seen}"
    return error.replace(log=log, hint=error.hint or inside)


def _look(job: Job) -> Path:
    """Move the partial image to the kept disks; returns the script that boots it."""
    kept = job.store.keep_failed(job.digest)
    if job.below is not None:
        disk.reback(kept, job.store.image(job.below))
    look = job.config.guest_state / f"look-{job.number}"
    disk_only = replace(spec(job, kept, job.logs, None), cds=(), boot="disk")
    live = replace(disk_only, cds=(job.isos["installer"],), boot="cd")
    files.write(look, look_script(live, disk_only, typed(job.config)), 0o755)
    return look


def typed(config: Config) -> list[str]:
    """The answers that make the installer's loader use the serial console, in order."""
    first = config.guest.phases[0].dialogue
    sent = [exchange.send.rstrip("\r\n") for exchange in config.guest.dialogue.get(first, [])]
    return [text.replace("\x1b", "Escape") for text in sent]


def look_script(live: Spec, disk_only: Spec, words: Sequence[str]) -> str:
    """A script that opens a kept disk in the installer's live system or, with `boot`, boots the disk itself.

    It leaves out the phase's CD, so that the phase does not run again. Writes go to a throw-away overlay. `words` are
    the answers that make the installer's loader use the console.
    """
    told = "The installer starts. " + (f"To its loader, type: {', '.join(words)}." if words else "")
    make = process.quote(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(live.disk.absolute())])
    return (
        "#!/bin/sh\n"
        "# Looks inside the disk of the failed phase; the kept disk stays as it is. Ctrl-A X ends QEMU.\n"
        "folder=$(mktemp -d) || exit 1\n"
        "trap 'rm -rf \"$folder\"' 0 1 2 15\n"
        f'{make} "$folder/disk.qcow2" || exit 1\n'
        'if [ "${1:-}" = boot ]; then\n'
        f"    {_on_overlay(disk_only)}\n"
        "else\n"
        f"    echo {process.quote([told])}\n"
        "    echo 'The kept disk is attached: log in as root and mount it. To boot it instead:' \"$0 boot\"\n"
        f"    {_on_overlay(live)}\n"
        "fi\n"
    )


def _on_overlay(machine: Spec) -> str:
    words = process.quote(on_terminal(replace(machine, disk=Path("@DISK@"))))
    return words.replace("@DISK@", "'\"$folder\"'/disk.qcow2")
