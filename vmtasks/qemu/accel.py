"""Choose the accelerator by a benchmark, and cache the choice until the host reboots.

It proves nothing that /dev/kvm opens or that a guest runs a few instructions: on some hosts each instruction of a KVM
guest is emulated, so that a boot sector finishes in seconds and a kernel never. So a boot sector does a fixed amount of
work, first under emulation (TCG), which works everywhere and is the baseline, then under the host's accelerator with a
time limit. The accelerator is used only if it was faster.
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

Candidate = Literal["kvm", "hvf"]
Name = Candidate | Literal["tcg"]

QEMU = "qemu-system-x86_64"
FORMAT = 1
"""Part of the cache key: add 1 when the benchmark changes."""

KVM = Path("/dev/kvm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CANDIDATES: dict[str, Candidate] = {"darwin": "hvf", "linux": "kvm"}
"""sys.platform -> the accelerator to compare with emulation."""

CPUS: dict[Name, tuple[str, ...]] = {
    "hvf": ("host",),
    "kvm": ("host", "host,-arch-capabilities"),
    "tcg": ("max",),
}
"""CPU models to try in order; the next only if QEMU aborts: some hosts show MSR 0x10a and refuse to set it."""

LOOP = 100_000_000
HARDWARE_S = 0.033
"""Seconds that hardware needs for LOOP rounds at 3 GHz: a taken `dec`+`jnz` pair fuses into one operation per cycle
(Agner Fog's instruction tables: Intel since Sandy Bridge, AMD since Zen). A native program on an EPYC took 0.027 s."""

FACTOR_MAX = 10.0
TCG_LIMIT_S = 20.0
LIMIT_MIN_S = 1.5
LIMIT_TIMES = 4.0
BENCHMARK_MAX_S = 3.2
"""The candidate's limit is LIMIT_TIMES the emulated run, at most what is left of BENCHMARK_MAX_S, at least LIMIT_MIN_S:
working hardware needs less than half a second. A host too busy for that uses emulation until it reboots, unless the
accelerator is asked for by name or the cache file is removed."""

DONE = 33
"""QEMU's status after the sector wrote 0x10 to isa-debug-exit: (0x10 << 1) | 1."""
ABORTED = 128 + signal.SIGABRT
KILLED = frozenset(128 + s for s in (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM))
"""Statuses of a QEMU that another process ended, which proves nothing about the accelerator."""

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
    # The work, between two marks on the debug console, so that firmware and start-up are not timed.
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
"""The boot sector: machine code in hexadecimal, and its nasm source."""


@dataclass(frozen=True)
class Accel:
    """An accelerator, and why it was chosen.

    `cpu` is for -cpu; `reason` is one sentence for people; multiply timeouts made for fast hardware by `factor`, see
    slowdown(); `probed_s` is how long the benchmark took.
    """

    name: Name
    cpu: str
    reason: str
    factor: float
    probed_s: float


@dataclass(frozen=True)
class Run:
    """One QEMU with the sector: its shell status, times in seconds, its stderr, and whether we killed it at the limit.

    `loop_s` is None unless the loop ran to its end.
    """

    status: int
    total_s: float
    loop_s: float | None
    stderr: str
    timed_out: bool = False


@dataclass(frozen=True)
class Result:
    """The candidate's result: whether it `works` within its limit, and whether it is `faster` than emulation."""

    accel: Accel
    works: bool
    faster: bool


class Cache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cache file: the host facts that the choices depend on, and the choices by what was wanted."""

    host: dict[str, str]
    answers: dict[str, Accel]


def probe(cache: Path, *, want: str = "auto") -> Accel:
    """Choose the accelerator for this host, from the file `cache` or by a benchmark (1 to 4 s).

    `want` is "auto" or an accelerator's name. A cached choice is valid until the host reboots, QEMU's binary changes or
    the access to /dev/kvm changes. MachineError when the accelerator asked for does not work; that is not cached, so
    that a fix takes effect at once. MissingToolError when QEMU is not installed.
    """
    qemu = Path(process.find(QEMU))
    host = host_facts(qemu)
    known = read_cache(cache, host)
    if want in known.answers:
        return known.answers[want]
    begin_s = time.monotonic()
    accel = replace(choose(want, qemu), probed_s=round(time.monotonic() - begin_s, 2))
    log.debug("accelerator %s", accel)
    write_cache(cache, Cache(host, {**known.answers, want: accel}))
    return accel


def choose(want: str, qemu: Path) -> Accel:
    """Run as much of the benchmark as `want` needs. MachineError when emulation or the accelerator asked for fails."""
    candidate = CANDIDATES.get(sys.platform)
    if want not in {"auto", "tcg", candidate}:
        raise MachineError(f"this host has no accelerator {want!r}", hint='set accel = "auto"')
    with tempfile.TemporaryDirectory(prefix="vmtasks-accel-") as folder:
        image = Path(folder, "probe.img")
        image.write_bytes(boot_sector())
        baseline = run_baseline(qemu, image)
        tcg = Accel("tcg", CPUS["tcg"][0], "emulation was asked for", slowdown(baseline), 0)
        if want == "tcg":
            return tcg
        if candidate is None:
            return replace(tcg, reason=f"only emulation is known to work on {sys.platform}")
        result = run_candidate(qemu, image, candidate, baseline)
    if result.faster or (result.works and want == candidate):
        return result.accel
    if want == candidate:
        hint = 'set accel = "auto" or "tcg" to emulate, or use a host with working (nested) virtualisation'
        raise MachineError(f"{want} was asked for and does not work here: {result.accel.reason}", hint=hint)
    return replace(tcg, reason=result.accel.reason)


def run_baseline(qemu: Path, image: Path) -> Run:
    """Run the sector under emulation. MachineError when that fails: then nothing else would work."""
    run = boot(qemu, image, "tcg", CPUS["tcg"][0], TCG_LIMIT_S)
    if run.loop_s is None:
        raise MachineError(
            f"{qemu} did not run a boot sector under emulation: {failure(run)}",
            hint=f"try: {process.quote(argv(qemu, image, 'tcg', CPUS['tcg'][0]))}",
        )
    return run


def run_candidate(qemu: Path, image: Path, candidate: Candidate, baseline: Run) -> Result:
    """Run the sector under `candidate`, with each of its CPU models until QEMU does not abort."""
    fault = kvm_fault() if candidate == "kvm" else ""
    if fault:
        return Result(Accel(candidate, "", fault, 1, 0), works=False, faster=False)
    limit_s = limit(baseline.total_s)
    deadline_s = time.monotonic() + limit_s
    note = ""
    for cpu in CPUS[candidate]:
        run = boot(qemu, image, candidate, cpu, deadline_s - time.monotonic())
        result = compare(candidate, cpu, run, baseline, limit_s=limit_s, note=note)
        if not aborted(run):
            break
        note = f" (QEMU aborts with -cpu {cpu}: {first_line(run.stderr)})"
    return result


def compare(candidate: Candidate, cpu: str, run: Run, baseline: Run, *, limit_s: float, note: str = "") -> Result:
    """Compare a candidate's run with the baseline; `note` is added to the reason."""
    base_s = baseline.loop_s or 0
    if run.loop_s is not None:
        reason = f"{candidate} did in {run.loop_s:.2f} s what emulation did in {base_s:.2f} s"
    elif run.timed_out:
        reason = f"{candidate} did not finish in {limit_s:.1f} s what emulation did in {baseline.total_s:.2f} s"
    else:
        reason = f"{candidate} did not run a boot sector: {failure(run)}"
    works = run.loop_s is not None
    faster = run.loop_s is not None and run.loop_s < base_s
    return Result(Accel(candidate, cpu, reason + note, slowdown(run), 0), works, faster)


def limit(emulated_s: float) -> float:
    """The candidate's time limit in seconds; QEMU's emulated run took `emulated_s` in all."""
    return max(LIMIT_MIN_S, min(LIMIT_TIMES * emulated_s, BENCHMARK_MAX_S - emulated_s))


def slowdown(run: Run) -> float:
    """The measured loop time relative to hardware's (HARDWARE_S), at least 1 and at most FACTOR_MAX.

    Precise enough for timeouts only: emulation slows counting less than memory accesses and system calls, and more than
    waiting for disk and network.
    """
    return 1.0 if run.loop_s is None else round(min(max(run.loop_s / HARDWARE_S, 1.0), FACTOR_MAX), 1)


def boot_sector() -> bytes:
    """The 512 bytes of the boot sector."""
    code = b"".join(bytes.fromhex(piece) for piece, _ in LISTING)
    return code.ljust(510, b"\0") + b"\x55\xaa"


def argv(qemu: Path, image: Path, name: Name, cpu: str) -> list[str]:
    """QEMU with the disk, a debug console for the marks and a device to exit."""
    return [
        *[str(qemu), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"],
        *["-accel", name, "-cpu", cpu, "-machine", "pc", "-m", "16"],
        *["-chardev", "stdio,id=marks,signal=off", "-device", "isa-debugcon,iobase=0xe9,chardev=marks"],
        *["-device", "isa-debug-exit,iobase=0x501,iosize=1"],
        *["-drive", f"file={image},format=raw"],
    ]


def boot(qemu: Path, image: Path, name: Name, cpu: str, limit_s: float) -> Run:
    """Run the sector to its end or for `limit_s`, then kill QEMU. MachineError if another process ended QEMU."""
    begin_s = time.monotonic()
    with process.spawn(argv(qemu, image, name, cpu), pipe=True) as child:
        try:
            seen = read_marks(child, begin_s + limit_s)
            timed_out = child.poll() is None
        finally:
            if child.poll() is None:
                # Nothing less ends a QEMU stuck in KVM; the whole group, because QEMU may be behind a wrapper.
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        total_s = time.monotonic() - begin_s
        stderr = child.stderr.read().decode(errors="replace") if child.stderr else ""
        status = process.TIMED_OUT if timed_out else process.shell_status(child.returncode)
    if status in KILLED:
        raise MachineError(f"the accelerator could not be chosen: QEMU was ended by signal {status - 128}")
    done = status == DONE and seen.keys() >= {"B", "E"}
    return Run(status, total_s, seen["E"] - seen["B"] if done else None, stderr, timed_out=timed_out)


def read_marks(child: process.Child, deadline_s: float) -> dict[str, float]:
    """Read the sector's marks until QEMU ends or `deadline_s`; returns when (monotonic seconds) each came first."""
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


def aborted(run: Run) -> bool:
    """Whether QEMU refused the CPU model, rather than failed in the accelerator."""
    return run.status == ABORTED or "failed to set MSR" in run.stderr


def failure(run: Run) -> str:
    """Why a run failed, for the end of a sentence."""
    if run.timed_out:
        return f"not done after {run.total_s:.1f} s"
    return f"QEMU ended with status {run.status}: {first_line(run.stderr)}"


def first_line(text: str) -> str:
    """The first line of QEMU's stderr, without the program's name."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no output")
    return line.removeprefix(f"{QEMU}: ")


def kvm_fault() -> str:
    """Why /dev/kvm cannot be opened and what to do about it, or ''."""
    try:
        os.close(os.open(KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = {
            errno.EACCES: "; add yourself to group kvm",
            errno.ENOENT: "; load kvm_intel or kvm_amd, or switch on (nested) virtualisation",
        }.get(error.errno or 0, "")
        return f"cannot open {KVM}: {error.strerror}{remedy}"
    return ""


def host_facts(qemu: Path) -> dict[str, str]:
    """The facts that a choice depends on. QEMU's path, mtime and size stand for its version, without starting it."""
    real = qemu.resolve()
    binary = real.stat()
    try:
        device = KVM.stat()
        access = f"{device.st_mode:o} {device.st_uid}:{device.st_gid} {kvm_fault()}"
    except OSError as error:
        access = str(error.strerror)
    return {
        "boot": boot_id(),
        "format": str(FORMAT),
        "kvm": access,
        "qemu": f"{real} {binary.st_mtime_ns} {binary.st_size}",
    }


def boot_id() -> str:
    """An id that changes with each boot of the host, or '' where the host has none: then nothing is cached."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        if sys.platform == "linux":
            return ""
    name = "kern.bootsessionuuid" if sys.platform == "darwin" else "kern.boottime"
    return process.run(["sysctl", "-n", name], timeout_s=5, check=False).stdout.strip()


def read_cache(file: Path, host: dict[str, str]) -> Cache:
    """Read the cache file; empty if it is missing, damaged or about another `host`."""
    try:
        cache = msgspec.json.decode(files.read(file), type=Cache)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.debug("no cached accelerator: %s", error)
        return Cache(host, {})
    return cache if cache.host == host else Cache(host, {})


def write_cache(file: Path, cache: Cache) -> None:
    """Write the cache file. If that fails, the next probe() runs the benchmark again."""
    if not cache.host["boot"]:
        return
    try:
        files.write(file, msgspec.json.format(msgspec.json.encode(cache), indent=2) + b"\n")
    except OSError as error:
        log.debug("cannot cache the accelerator in %s: %s", file, error)
