"""A person at a guest's console: install the system by hand, and look at a phase from inside."""

import os
import sys
from pathlib import Path

from vmtasks.config.load import show_size
from vmtasks.errors import MachineError, MissingToolError, StateError
from vmtasks.host import files, process, progress
from vmtasks.host.locks import lock
from vmtasks.host.progress import Say
from vmtasks.images import make
from vmtasks.images.steps import Builder
from vmtasks.images.workspace import Workspace
from vmtasks.machines import life
from vmtasks.machines.folder import Place
from vmtasks.media import disk, template
from vmtasks.media.iso import write_iso
from vmtasks.media.tree import Entry
from vmtasks.qemu import argv, hardware

WINDOWS = ("gtk", "sdl", "cocoa")
"""Displays of QEMU that are windows, the best first."""
LABEL = "VMTASKS_KEY"
KEYS = "Ctrl-A X ends the machine, Ctrl-A C is QEMU's monitor"


def window(*, wanted: bool) -> str:
    """The value for `-display`: a window if `wanted`, else 'none'. MissingToolError, StateError when none can open."""
    if not wanted:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise StateError(
                "a person must be at the guest's console, and this is no terminal", hint="run it in one, or --display"
            )
        return "none"
    listed = process.run([argv.PROGRAM, "-display", "help"], timeout_s=30, check=False).stdout.split()
    name = next((name for name in WINDOWS if name in listed), "")
    if not name:
        raise MissingToolError(
            f"this QEMU can open no window: it has neither {', '.join(WINDOWS[:-1])} nor {WINDOWS[-1]}",
            hint="apt-get install qemu-system-gui, or leave --display out and use the serial console",
        )
    if name != "cocoa" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise StateError(
            "there is no screen for a window: neither DISPLAY nor WAYLAND_DISPLAY is set",
            hint="ssh -X, or leave --display out and use the serial console",
        )
    return name


def key_cd(state: Workspace, user: str, out: Path) -> None:
    """Write the CD that authorizes our key for `user`: authorized_keys, key.sh and a README. It has no pfi.conf."""
    public = files.read_text(state.public_key).strip()
    texts = {
        "README": (how_to(user), 0o444),
        "authorized_keys": (public + "\n", 0o444),
        "key.sh": (template.shipped("key.sh"), 0o555),
        "user": (user + "\n", 0o444),
    }
    write_iso(out, [Entry(name, "file", mode, text.encode()) for name, (text, mode) in texts.items()], label=LABEL)


def how_to(user: str) -> str:
    """Instructions for the key's CD, for its README and for the person at the console."""
    return (
        f"The CD {LABEL} lets the key of `doit` log in as {user}. On the installed system, as root:\n"
        "    DragonFlyBSD   mount_cd9660 /dev/cd0 /mnt && sh /mnt/key.sh\n"
        "    Linux          mount -o ro /dev/sr0 /mnt && sh /mnt/key.sh\n"
        "On the installer's live system it is the second CD (cd1, sr1); with the new system mounted on /target:\n"
        "    sh /mnt/key.sh -r /target\n"
        "The system needs an SSH server that starts at boot, on an interface that takes its address by DHCP.\n"
        "Then power it off. On the host: doit start, doit provision --phase N, doit stop, doit snapshot --name NAME\n"
    )


def install(builder: Builder, *, user: str, display: str, say: Say = progress.say) -> None:
    """Boot the installer on a new disk of the configured machine, for a person. The old disk is removed."""
    place, installer = Place(builder.config), builder.installer()
    life.prepare_install(place, user)
    builder.make_key()
    key_cd(builder, user, place.key_cd)
    size = show_size(builder.config.disk_size)
    say(f"machine {place.name}: the installer starts, with an empty disk of {size}; {KEYS}")
    _say_typed(builder, display, say)
    say(how_to(user).rstrip())
    say("If the system restarts, it comes back here: end it, and go on with `doit install --disk`.")
    _boot(place, [installer, place.key_cd], "cd", display, say)


def go_on(builder: Builder, *, display: str, say: Say = progress.say) -> None:
    """Boot what was installed by hand, with the key's CD in its drive."""
    place = Place(builder.config)
    record = place.record()
    say(f"machine {place.name}: its disk starts; {KEYS}")
    if record is not None and not record.image:
        say(how_to(record.ssh_user).rstrip())
    _boot(place, [place.key_cd] if place.key_cd.is_file() else [], "disk", display, say)


def _boot(place: Place, cds: list[Path], boot: str, display: str, say: Say) -> None:
    status = life.boot_on_terminal(place, cds, boot=boot, display=display)
    if status != 0:
        raise MachineError(f"QEMU ended with status {status}", hint="its own words are above")
    say(f"machine {place.name} is at rest; next: doit start")


def look(builder: Builder, number: int, *, cd: bool, live: bool, display: str, say: Say = progress.say) -> None:
    """Boot as phase `number` does, on a throw-away copy of its disk, for a person to look.

    `cd`: with the phase's CD, so that the phase runs; nothing is published. `live`: the installer's live system instead
    of the disk, which is attached.
    """
    config, phase = builder.config, builder.phase(number)
    copy = builder.look_disk(number)
    with lock(builder.home / f".look-{number}.lock", f"look:{number}", timeout_s=0):
        copy.unlink(missing_ok=True)
        below = builder.below(number, look="sample")
        with builder.store.explaining(below, "doit auto_install"):
            if below is None:
                disk.create(copy, config.disk_size)
            else:
                disk.overlay(copy, builder.store.image(below))
        isos = {"installer": builder.installer(), "phase": builder.iso(number)}
        boot, drives = ("cd", ["installer", "phase"]) if live else (phase.boot, list(phase.cds))
        machine = hardware.spec(
            config,
            builder.accel,
            name=f"{config.label}-look-{number}",
            disk=copy,
            cds=tuple(isos[drive] for drive in drives if cd or drive != "phase"),
            boot=boot,
            console_socket=builder.home,
            console_log=builder.home,
            qmp_socket=builder.home,
        )
        what = "the installer's live system" if live else ("the installer" if boot == "cd" else "the disk")
        say(f"look:{number}: {what} starts as phase {phase.name} would find it, on a throw-away copy; {KEYS}")
        if boot == "cd":
            _say_typed(builder, display, say)
        if cd:
            say("The phase's CD is in its drive: the phase will run, and power off. Nothing of it is kept.")
        try:
            status = process.run_attached(argv.on_terminal(machine, display))
        finally:
            copy.unlink(missing_ok=True)
    if status != 0:
        raise MachineError(f"QEMU ended with status {status}", hint="its own words are above")


def _say_typed(builder: Builder, display: str, say: Say) -> None:
    words = make.typed(builder.config)
    if words and display == "none":
        say(f"To its loader, type: {', '.join(words)}. Otherwise it uses the screen, and nothing more is seen here.")
