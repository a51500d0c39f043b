"""Which accelerator really works here: a race of boot sectors, and its answer kept until the host boots again.

Neither that /dev/kvm opens nor that a guest runs a few instructions proves anything: on some hosts each instruction of
a KVM guest is emulated, so that a boot sector finishes in seconds and a kernel never. What tells is a fixed amount of
work. Emulation (TCG) does it first: it works everywhere and is the yardstick. Then the host's own accelerator does the
same under a limit, and is used only if it was quicker.
"""

import errno
import logging
import os
import selectors
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from vmtasks.errors import MachineError
from vmtasks.host import files, process

log = logging.getLogger(__name__)

Name = Literal["kvm", "hvf", "tcg"]

QEMU = "qemu-system-x86_64"
FORMAT = 1
"""Part of what a kept answer depends on: add 1 when the race changes its rules."""

KVM = Path("/dev/kvm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CANDIDATES: dict[str, Literal["kvm", "hvf"]] = {"darwin": "hvf", "linux": "kvm"}
"""sys.platform -> the accelerator that races against emulation."""

CPUS: dict[Name, tuple[str, ...]] = {
    "hvf": ("host",),
    "kvm": ("host", "host,-arch-capabilities"),
    "tcg": ("max",),
}
"""CPU models in the order tried; the next one only if QEMU aborts: some hosts show MSR 0x10a and refuse to set it."""

LOOP = 100_000_000
HARDWARE_S = 0.033
"""Seconds that hardware needs for LOOP rounds: a taken `dec`+`jnz` pair fuses into one operation that runs once per
cycle (Agner Fog's instruction tables: Intel since Sandy Bridge, AMD since Zen), at 3 GHz. Measured outside QEMU, in a
program of its own on an EPYC server: 0.027 s."""

FACTOR_MAX = 10.0
TCG_LIMIT_S = 20.0
LIMIT_MIN_S = 1.5
LIMIT_TIMES = 4.0
WHOLE_S = 3.2
"""The candidate gets LIMIT_TIMES what emulation took, within the time that the whole race may take, but LIMIT_MIN_S
at least: working hardware needs less than half a second. A host so busy that it needs more is emulated on until it
boots again, unless the accelerator is asked for by name or the cache file removed."""

DONE = 33
"""QEMU's status when the sector has written 0x10 to isa-debug-exit: (0x10 << 1) | 1."""
ABORTED = 128 + signal.SIGABRT
OUTSIDE = frozenset(128 + s for s in (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM))
"""Statuses that say that somebody else ended QEMU, which proves nothing about the accelerator."""

LISTING: tuple[tuple[str, str], ...] = (
    ("", "bits 16"),
    ("", "org 0x7c00"),
    ("fa", "cli"),
    ("66 31 c0", "xor eax, eax"),
    ("8e d8", "mov ds, ax"),
    ("8e c0", "mov es, ax"),
    # Page tables at 0x1000, 0x2000 and 0x3000, zeroed: one entry in each maps the first 2 MiB onto themselves.
    ("66 bf 00 10 00 00", "mov edi, 0x1000"),
    ("0f 22 df", "mov cr3, edi"),
    ("b9 00 0c", "mov cx, 0x0c00"),
    ("fc", "cld"),
    ("f3 66 ab", "rep stosd"),
    ("c7 06 00 10 03 20", "mov word [0x1000], 0x2003"),
    ("c7 06 00 20 03 30", "mov word [0x2000], 0x3003"),
    ("c7 06 00 30 83 00", "mov word [0x3000], 0x0083"),
    # CR4.PAE, EFER.LME, then paging and protection at once: that is long mode.
    ("0f 20 e0", "mov eax, cr4"),
    ("0c 20", "or al, 0x20"),
    ("0f 22 e0", "mov cr4, eax"),
    ("66 b9 80 00 00 c0", "mov ecx, 0xc0000080"),
    ("0f 32", "rdmsr"),
    ("80 cc 01", "or ah, 0x01"),
    ("0f 30", "wrmsr"),
    ("0f 01 16 65 7c", "lgdt [gdt_register]"),
    ("0f 20 c0", "mov eax, cr0"),
    ("66 0d 01 00 00 80", "or eax, 0x80000001"),
    ("0f 22 c0", "mov cr0, eax"),
    ("ea 6b 7c 08 00", "jmp 0x08:long_mode"),
    ("", "gdt:"),
    ("00 00 00 00 00 00 00 00", "dq 0"),
    ("00 00 00 00 00 9a 20 00", "dq 0x00209a0000000000"),
    ("", "gdt_register:"),
    ("0f 00", "dw 15"),
    ("55 7c 00 00", "dd gdt"),
    # The work, between two marks on the debug console, so that the time of firmware and start-up is not in it.
    ("", "bits 64"),
    ("", "long_mode:"),
    ("b0 42", "mov al, 'B'"),
    ("e6 e9", "out 0xe9, al"),
    ("b9 00 e1 f5 05", f"mov ecx, {LOOP}"),
    ("", "count:"),
    ("ff c9", "dec ecx"),
    ("75 fc", "jnz count"),
    ("b0 45", "mov al, 'E'"),
    ("e6 e9", "out 0xe9, al"),
    ("66 ba 01 05", "mov dx, 0x0501"),
    ("b0 10", "mov al, 0x10"),
    ("ee", "out dx, al"),
    ("f4", "hlt"),
)
"""The boot sector: machine code in hexadecimal, and the assembly (nasm) that it comes from."""


@dataclass(frozen=True)
class Accel:
    """An accelerator, and why it was chosen.

    `cpu` is for -cpu; `reason` one sentence for people; timeouts that are right on fast hardware are multiplied by
    `factor`, see slowdown(); `probed_s` is what the race took when it was run.
    """

    name: Name
    cpu: str
    reason: str
    factor: float
    probed_s: float


@dataclass(frozen=True)
class Run:
    """One QEMU with the sector: its shell status, times in seconds, and whether we ended it at the limit.

    `loop_s` is None unless the whole loop was seen; `said` is what QEMU wrote to stderr.
    """

    status: int
    total_s: float
    loop_s: float | None
    said: str
    timed_out: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the race says of the host's accelerator: `works` in time at all, and `wins` against emulation."""

    accel: Accel
    works: bool
    wins: bool


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cache file: what the answers depend on, and the answers by what was wanted."""

    host: dict[str, str]
    answers: dict[str, Accel]


def probe(cache: Path, *, want: str = "auto") -> Accel:
    """Choose the accelerator for this host, from the answer kept in the file `cache` or by a race (1 to 4 s at most).

    `want` is "auto" or an accelerator's name. An answer holds until the host boots, QEMU's binary is another or
    the access to /dev/kvm changes. "No" to an accelerator asked for by name is MachineError and is not kept,
    so that a remedy works at once. MissingToolError when QEMU is not installed.
    """
    qemu = Path(process.find(QEMU))
    host = facts(qemu)
    kept = load(cache, host)
    if want in kept.answers:
        return kept.answers[want]
    begin_s = time.monotonic()
    answer = choose(want, qemu)
    answer = replace(answer, probed_s=round(time.monotonic() - begin_s, 2))
    log.debug("accelerator %s", answer)
    keep(cache, Kept(host, {**kept.answers, want: answer}))
    return answer


def choose(want: str, qemu: Path) -> Accel:
    """Run the race as far as `want` needs it. MachineError when emulation fails, or what is asked for by name does."""
    rival = CANDIDATES.get(sys.platform)
    if want not in {"auto", "tcg", rival}:
        raise MachineError(f"this host has no accelerator {want!r}", hint='set accel = "auto"')
    with tempfile.TemporaryDirectory(prefix="vmtasks-accel-") as folder:
        image = Path(folder, "probe.img")
        image.write_bytes(sector())
        yardstick = emulate(qemu, image)
        tcg = Accel("tcg", CPUS["tcg"][0], "emulation was asked for", slowdown(yardstick), 0)
        if want == "tcg":
            return tcg
        if rival is None:
            return replace(tcg, reason=f"only emulation is known to work on {sys.platform}")
        verdict = challenge(qemu, image, rival, yardstick)
    if verdict.wins or (verdict.works and want == rival):
        return verdict.accel
    if want == rival:
        hint = 'set accel = "auto" or "tcg" to emulate, or use a host with working (nested) virtualisation'
        raise MachineError(f"{want} was asked for and does not work here: {verdict.accel.reason}", hint=hint)
    return replace(tcg, reason=verdict.accel.reason)


def emulate(qemu: Path, image: Path) -> Run:
    """Run the yardstick. MachineError when QEMU cannot even emulate: then nothing else would work."""
    run = boot(qemu, image, "tcg", CPUS["tcg"][0], TCG_LIMIT_S)
    if run.loop_s is None:
        raise MachineError(
            f"{qemu} did not run a boot sector under emulation: {ending(run)}",
            hint=f"try: {process.quote(argv(qemu, image, 'tcg', CPUS['tcg'][0]))}",
        )
    return run


def challenge(qemu: Path, image: Path, rival: Literal["kvm", "hvf"], yardstick: Run) -> Verdict:
    """Let `rival` do what emulation did, with each of its CPU models until QEMU does not abort."""
    cannot = refusal() if rival == "kvm" else ""
    if cannot:
        return Verdict(Accel(rival, "", cannot, 1, 0), works=False, wins=False)
    limit_s = limit(yardstick.total_s)
    deadline_s = time.monotonic() + limit_s
    aside = ""
    for cpu in CPUS[rival]:
        run = boot(qemu, image, rival, cpu, deadline_s - time.monotonic())
        verdict = judge(rival, cpu, run, yardstick, limit_s=limit_s, aside=aside)
        if not aborted(run):
            break
        aside = f" (QEMU aborts with -cpu {cpu}: {first_line(run.said)})"
    return verdict


def judge(
    rival: Literal["kvm", "hvf"], cpu: str, run: Run, yardstick: Run, *, limit_s: float, aside: str = ""
) -> Verdict:
    """Compare two runs of the sector; `aside` is added to the reason."""
    base_s = yardstick.loop_s or 0
    if run.loop_s is not None:
        wins = run.loop_s < base_s
        reason = f"{rival} did in {run.loop_s:.2f} s what emulation did in {base_s:.2f} s"
    elif run.timed_out:
        wins = False
        reason = f"{rival} did not finish in {limit_s:.1f} s what emulation did in {yardstick.total_s:.2f} s"
    else:
        wins = False
        reason = f"{rival} did not run a boot sector: {ending(run)}"
    return Verdict(Accel(rival, cpu, reason + aside, slowdown(run), 0), works=run.loop_s is not None, wins=wins)


def limit(emulated_s: float) -> float:
    """Seconds for the candidate, after emulation took `emulated_s` from the start of QEMU to its end."""
    return max(LIMIT_MIN_S, min(LIMIT_TIMES * emulated_s, WHOLE_S - emulated_s))


def slowdown(run: Run) -> float:
    """Compare the measured seconds of the loop with hardware's (HARDWARE_S), at least 1 and at most FACTOR_MAX.

    Counting is neither what emulation does worst (memory and system calls are) nor what it does not slow at all
    (waiting for disk and network), which is what makes it usable for timeouts, and for nothing finer.
    """
    return 1.0 if run.loop_s is None else round(min(max(run.loop_s / HARDWARE_S, 1.0), FACTOR_MAX), 1)


def sector() -> bytes:
    """Make the 512 bytes of the boot sector."""
    code = b"".join(bytes.fromhex(piece) for piece, _ in LISTING)
    return code.ljust(510, b"\0") + b"\x55\xaa"


def argv(qemu: Path, image: Path, name: Name, cpu: str) -> list[str]:
    """QEMU with nothing but the disk, a way to say where it is and a way to end."""
    return [
        *[str(qemu), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"],
        *["-accel", name, "-cpu", cpu, "-machine", "pc", "-m", "16"],
        *["-chardev", "stdio,id=marks,signal=off", "-device", "isa-debugcon,iobase=0xe9,chardev=marks"],
        *["-device", "isa-debug-exit,iobase=0x501,iosize=1"],
        *["-drive", f"file={image},format=raw"],
    ]


def boot(qemu: Path, image: Path, name: Name, cpu: str, limit_s: float) -> Run:
    """Run the sector to its end or for `limit_s`; QEMU is gone afterwards. MachineError if others ended QEMU."""
    begin_s = time.monotonic()
    with process.spawn(argv(qemu, image, name, cpu), pipe=True) as child:
        try:
            seen = marks(child, begin_s + limit_s)
            late = child.poll() is None
        finally:
            kill(child)
        total_s = time.monotonic() - begin_s
        said = child.stderr.read().decode(errors="replace") if child.stderr else ""
        status = process.TIMED_OUT if late else process.shell_status(child.returncode)
    if status in OUTSIDE:
        raise MachineError(f"the accelerator could not be chosen: QEMU was ended by signal {status - 128}")
    done = status == DONE and seen.keys() >= {"B", "E"}
    return Run(status, total_s, seen["E"] - seen["B"] if done else None, said, timed_out=late)


def marks(child: process.Child, deadline_s: float) -> dict[str, float]:
    """When (monotonic seconds) the sector wrote each of its letters; returns when QEMU has ended or at the deadline."""
    seen: dict[str, float] = {}
    if child.stdout is None:
        return seen
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline_s - time.monotonic())):
            data = os.read(child.stdout.fileno(), 64)
            if not data:
                break
            for letter in data.decode("latin-1"):
                seen.setdefault(letter, time.monotonic())
    # The pipe closes a moment before the process ends.
    if not process.wait(child, max(0.1, deadline_s - time.monotonic())):
        log.debug("QEMU %d still runs at its deadline", child.pid)
    return seen


def kill(child: process.Child) -> None:
    """SIGKILL, because a QEMU stuck in KVM heeds nothing less; to the group, because QEMU may be behind a wrapper."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def aborted(run: Run) -> bool:
    """Whether QEMU refused the CPU model rather than failed in the accelerator."""
    return run.status == ABORTED or "failed to set MSR" in run.said


def ending(run: Run) -> str:
    """How a run ended that did not do the work, for the end of a sentence."""
    if run.timed_out:
        return f"not done after {run.total_s:.1f} s"
    return f"QEMU ended with status {run.status}: {first_line(run.said)}"


def first_line(text: str) -> str:
    """Find the first line of what QEMU wrote, without the program's name."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no output")
    return line.removeprefix(f"{QEMU}: ")


def refusal() -> str:
    """Why /dev/kvm cannot be opened and what to do about it; empty if it can."""
    try:
        os.close(os.open(KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = {
            errno.EACCES: "; add yourself to group kvm",
            errno.ENOENT: "; load kvm_intel or kvm_amd, or switch on (nested) virtualisation",
        }.get(error.errno or 0, "")
        return f"cannot open {KVM}: {error.strerror}{remedy}"
    return ""


def facts(qemu: Path) -> dict[str, str]:
    """Gather what an answer depends on.

    A new version of QEMU is a new file, so that its date and size stand for it and QEMU need not be started to ask.
    """
    real = qemu.resolve()
    binary = real.stat()
    try:
        device = KVM.stat()
        access = f"{device.st_mode:o} {device.st_uid}:{device.st_gid} {refusal()}"
    except OSError as error:
        access = str(error.strerror)
    return {
        "boot": boot_id(),
        "format": str(FORMAT),
        "kvm": access,
        "qemu": f"{real} {binary.st_mtime_ns} {binary.st_size}",
    }


def boot_id() -> str:
    """Read what is another after each boot of the host; empty, and then nothing is kept, where that is not known."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        if sys.platform == "linux":
            return ""
    name = "kern.bootsessionuuid" if sys.platform == "darwin" else "kern.boottime"
    return process.run(["sysctl", "-n", name], timeout_s=5, check=False).stdout.strip()


def load(file: Path, host: dict[str, str]) -> Kept:
    """Read the kept answers, if there are any and they are about this `host`; a damaged file is as good as none."""
    try:
        kept = msgspec.json.decode(files.read(file), type=Kept)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.debug("no kept accelerator: %s", error)
        return Kept(host, {})
    return kept if kept.host == host else Kept(host, {})


def keep(file: Path, kept: Kept) -> None:
    """Write the cache file; a folder that cannot be written costs a race next time, nothing else."""
    if not kept.host["boot"]:
        return
    try:
        files.write(file, msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n")
    except OSError as error:
        log.debug("cannot keep the accelerator in %s: %s", file, error)
