"""PURE: Spec -> QEMU's argv, one small function per device. Starts nothing."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

GUEST_SSH_PORT = 22
PROGRAM = "qemu-system-x86_64"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
WINDOW_SANDBOX = "on,obsolete=deny,elevateprivileges=deny"
"""For a machine in a window: GUI toolkits spawn processes and set thread priorities."""


@dataclass(frozen=True)
class Share:
    """A folder of this host that a guest with 9p support can mount by its tag."""

    tag: str
    folder: str
    read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One QEMU. `memory` in bytes; `ssh_port` None: no SSH forward; `network` "none": no outgoing connections.

    `forwards` are pairs of a loopback port of this host (0: any) and a port of the guest. Without `mac` the network
    card has QEMU's default address, the same in every machine.
    """

    name: str
    accel: str
    cpu: str
    machine_type: str
    memory: int
    cpus: int
    disk: Path
    disk_bus: str
    disk_cache: str = "writeback"
    disk_serial: str
    cds: tuple[Path, ...] = ()
    cd_bus: str = "ide"
    boot: str = "disk"
    nic: str
    mac: str = ""
    network: str = "user"
    ssh_port: int | None = None
    forwards: tuple[tuple[int, int], ...] = ()
    shares: tuple[Share, ...] = ()
    rng: bool = True
    console_socket: Path
    console_log: Path
    qmp_socket: Path
    events: Path | None = None
    """Base name of the two files of qemu/events.py."""
    firmware_log: Path | None = None
    pidfile: Path | None = None
    throwaway: bool = False
    """For a phase: the disk need not survive a host crash, because an image is synced before it is published, and a
    reboot ends QEMU."""


def command(spec: Spec) -> list[str]:
    """The complete argv, with the program first."""
    return [
        PROGRAM,
        *basics(spec),
        *board(spec),
        *disk(spec),
        *cds(spec),
        *network(spec),
        *shares(spec),
        *console(spec),
        *monitor(spec),
        *extras(spec),
        *lifecycle(spec),
    ]


def on_terminal(spec: Spec, display: str = "none") -> list[str]:
    """The argv of the same machine with its console and QEMU's monitor on the terminal.

    `display` is the value of `-display`.
    """
    plain = replace(spec, pidfile=None, firmware_log=None)
    here = ["-serial", "mon:stdio", "-display", display, "-vga", "std"]
    sandbox = SANDBOX if display == "none" else WINDOW_SANDBOX
    machine = [*board(plain), *disk(plain), *cds(plain), *network(plain), *here, *extras(plain)]
    return [PROGRAM, *basics(plain, sandbox), *machine]


def basics(spec: Spec, sandbox: str = SANDBOX) -> list[str]:
    """Name, no default devices or configuration files, and the seccomp sandbox."""
    return ["-name", f"guest={_comma(spec.name)}", "-nodefaults", "-no-user-config", "-sandbox", sandbox]


def board(spec: Spec) -> list[str]:
    """Machine type, accelerator, processor and memory."""
    accel = "tcg,thread=multi" if spec.accel == "tcg" else spec.accel
    memory = f"{spec.memory >> 20}M"
    return ["-machine", spec.machine_type, "-accel", accel, "-cpu", spec.cpu, "-smp", str(spec.cpus), "-m", memory]


def disk(spec: Spec) -> list[str]:
    """The disk on its bus, and the controllers, which CDs may share."""
    node: dict[str, object] = {"driver": "qcow2", "node-name": "disk0", "discard": "unmap", "file": _file(spec.disk)}
    cache = {"direct": spec.disk_cache == "none", "no-flush": spec.throwaway or spec.disk_cache == "unsafe"}
    if any(cache.values()):
        node["cache"] = {key: value for key, value in cache.items() if value}
    devices = {
        "virtio-scsi": "scsi-hd,bus=scsi0.0,scsi-id=0",
        "virtio-blk": "virtio-blk-pci",
        "ide": f"ide-hd,{_ide(spec, 0)}",
        "ahci": "ide-hd,bus=ahci0.0",
    }
    index = 1 if spec.boot == "cd" else 0
    device = f"{devices[spec.disk_bus]},drive=disk0,serial={spec.disk_serial},bootindex={index}"
    return [*_controllers(spec), "-blockdev", json.dumps(node), "-device", device]


def cds(spec: Spec) -> list[str]:
    """CD drives, in the order that the guest sees. All are read-only, so that two drives may have the same file."""
    argv = []
    for n, path in enumerate(spec.cds):
        node = {"driver": "raw", "node-name": f"cd{n}", "read-only": True, "file": {**_file(path), "read-only": True}}
        if spec.cd_bus == "virtio-scsi":
            place = f"scsi-cd,bus=scsi0.0,scsi-id={n + 1}"
        else:
            place = f"ide-cd,{_ide(spec, n + (spec.disk_bus == 'ide'))}"
        boot = ",bootindex=0" if spec.boot == "cd" and n == 0 else ""
        argv += ["-blockdev", json.dumps(node), "-device", f"{place},drive=cd{n}{boot}"]
    return argv


def network(spec: Spec) -> list[str]:
    """User networking. QEMU binds the loopback ports that are forwarded."""
    options = ["user", "id=net0"]
    if spec.network == "none":
        options.append("restrict=on")
    if spec.ssh_port is not None:
        options.append(f"hostfwd=tcp:127.0.0.1:{spec.ssh_port}-:{GUEST_SSH_PORT}")
    options += [f"hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in spec.forwards]
    # Without a ROM, an unbootable disk does not cost seconds of network boot.
    mac = f",mac={spec.mac}" if spec.mac else ""
    return ["-netdev", ",".join(options), "-device", f"{spec.nic},netdev=net0{mac},romfile="]


def shares(spec: Spec) -> list[str]:
    """9p shares. Files keep the host's owners; the guest has QEMU's permissions."""
    argv = []
    for n, share in enumerate(spec.shares):
        mode = ",readonly=on" if share.read_only else ""
        argv += [
            "-fsdev",
            f"local,id=fs{n},path={_comma(share.folder)},security_model=none,multidevs=remap{mode}",
            "-device",
            f"virtio-9p-pci,fsdev=fs{n},mount_tag={share.tag}",
        ]
    return argv


def console(spec: Spec) -> list[str]:
    """COM1 on a socket, always logged to a file."""
    path, log = _comma(str(spec.console_socket)), _comma(str(spec.console_log))
    chardev = f"socket,id=serial0,path={path},server=on,wait=off,logfile={log},logappend=on"
    return ["-chardev", chardev, "-serial", "chardev:serial0", "-display", "none", "-vga", "std"]


def monitor(spec: Spec) -> list[str]:
    """QMP on a socket; with `events`, a second monitor that writes its events to a file."""
    chardev = f"socket,id=qmp0,path={_comma(str(spec.qmp_socket))},server=on,wait=off"
    argv = ["-chardev", chardev, "-mon", "chardev=qmp0,mode=control"]
    if spec.events is not None:
        pipe = f"pipe,id=events0,path={_comma(str(spec.events))}"
        argv += ["-chardev", pipe, "-mon", "chardev=events0,mode=control"]
    return argv


def extras(spec: Spec) -> list[str]:
    """The panic device, the entropy device, and the firmware's log."""
    argv = ["-device", "pvpanic"]
    if spec.rng:
        argv += ["-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0"]
    if spec.firmware_log is not None:
        log = _comma(str(spec.firmware_log))
        argv += ["-chardev", f"file,id=firmware,path={log}", "-device", "isa-debugcon,iobase=0x402,chardev=firmware"]
    return argv


def lifecycle(spec: Spec) -> list[str]:
    """Reboot and panic actions: a reboot ends a phase but resets a machine; a panic pauses both."""
    reboot = "shutdown" if spec.throwaway else "reset"
    pidfile = [] if spec.pidfile is None else ["-pidfile", str(spec.pidfile)]
    return ["-action", f"reboot={reboot},panic=pause", *pidfile]


def _controllers(spec: Spec) -> list[str]:
    argv = []
    if spec.disk_bus == "virtio-scsi" or (spec.cd_bus == "virtio-scsi" and spec.cds):
        argv += ["-device", "virtio-scsi-pci,id=scsi0"]
    if spec.disk_bus == "ahci":
        argv += ["-device", "ahci,id=ahci0"]
    return argv


def _ide(spec: Spec, number: int) -> str:
    """Bus and unit of IDE drive `number`: pc has two channels of two drives, q35 six ports of one."""
    units = 1 if "q35" in spec.machine_type else 2
    return f"bus=ide.{number // units},unit={number % units}"


def _file(path: Path) -> dict[str, object]:
    return {"driver": "file", "filename": str(path)}


def _comma(text: str) -> str:
    """Escape commas, which end a value in QEMU's option parser."""
    return text.replace(",", ",,")
