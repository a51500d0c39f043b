"""The accelerator benchmark on this host, and the cached choice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from amount import cases
from vmtasks.errors import MachineError, MissingToolError
from vmtasks.host import process
from vmtasks.qemu import accel
from vmtasks.qemu.accel import Accel, Run

needs_qemu = pytest.mark.skipif(not shutil.which(accel.QEMU), reason="QEMU is not installed")
SOME = Accel("tcg", "max", "as kept", 4.0, 0.5)


def script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Put a wrapper before QEMU, alone in PATH; call the fixture for the argv of each start."""
    calls = tmp_path / "calls"
    script(tmp_path / "bin" / accel.QEMU, f'echo "$*" >>{calls}\nexec {shutil.which(accel.QEMU)} "$@"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return lambda: calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def no_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the race short: there is nothing to challenge emulation."""
    monkeypatch.setattr(accel, "KVM", tmp_path / "no-kvm")
    monkeypatch.setattr(sys, "platform", "linux")


def seed(file: Path) -> None:
    """Keep an answer that no race here gives, as of now, for "auto" and "tcg"."""
    accel.write_cache(file, accel.Cache(accel.host_facts(Path(process.find(accel.QEMU))), {"auto": SOME, "tcg": SOME}))


def children() -> list[str]:
    """List the argv of all processes below this one, those that are not reaped included."""
    listing = process.run(["ps", "-eo", "pid=,ppid=,args="], timeout_s=10).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    return [args for _, parent, args in rows if parent == str(os.getpid()) and not args.startswith("ps ")]


@needs_qemu
def test_auto_is_what_really_works(tmp_path: Path):
    before = children()
    begin_s = time.monotonic()
    found = accel.probe(tmp_path / "accel.json")
    took_s = time.monotonic() - begin_s
    assert took_s < 30
    assert 0 < found.probed_s <= took_s + 0.01
    assert 1 <= found.factor <= 10
    assert found.reason
    assert children() == before
    # The truth, found another way: does a candidate get through the sector in a second?
    rival = accel.CANDIDATES.get(sys.platform)
    image = tmp_path / "probe.img"
    image.write_bytes(accel.boot_sector())
    qemu = Path(process.find(accel.QEMU))
    opens = rival is not None and (rival != "kvm" or not accel.kvm_fault())
    runs = [accel.boot(qemu, image, rival, cpu, 2) for cpu in accel.CPUS[rival]] if rival and opens else []
    works = any(run.loop_s is not None and run.total_s < 1 for run in runs)
    assert found.name == (rival if works else "tcg")
    assert found.cpu in accel.CPUS[found.name]


@needs_qemu
def test_the_sector_does_its_work_under_emulation(tmp_path: Path):
    (tmp_path / "probe.img").write_bytes(accel.boot_sector())
    run = accel.boot(Path(process.find(accel.QEMU)), tmp_path / "probe.img", "tcg", "max", 20)
    assert run.status == accel.DONE
    assert run.loop_s is not None
    assert 0 < run.loop_s < run.total_s


@pytest.mark.skipif(not shutil.which("nasm"), reason="nasm is not installed")
def test_listing_is_what_nasm_makes_of_it(tmp_path: Path):
    (tmp_path / "a.asm").write_text("\n".join(text for _, text in accel.LISTING) + "\n")
    process.run(["nasm", "-f", "bin", "-o", tmp_path / "a.bin", tmp_path / "a.asm"], timeout_s=10)
    code = (tmp_path / "a.bin").read_bytes()
    assert accel.boot_sector() == code.ljust(510, b"\0") + b"\x55\xaa"


@needs_qemu
@pytest.mark.usefixtures("no_kvm")
def test_second_call_starts_nothing(tmp_path: Path, starts: Callable[[], list[str]]):
    first = accel.probe(tmp_path / "cache" / "accel.json")
    assert len(starts()) == 1
    assert accel.probe(tmp_path / "cache" / "accel.json") == first
    assert len(starts()) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["accel.json"]


@needs_qemu
@pytest.mark.usefixtures("no_kvm")
def test_forced_and_automatic_answers_are_kept_apart(tmp_path: Path, starts: Callable[[], list[str]]):
    for _ in range(2):
        assert accel.probe(tmp_path / "cache" / "accel.json", want="tcg").reason == "emulation was asked for"
        assert "cannot open" in accel.probe(tmp_path / "cache" / "accel.json").reason
    assert len(starts()) == 2


@needs_qemu
@pytest.mark.usefixtures("no_kvm")
@pytest.mark.parametrize("change", ["access", "boot", "format", "qemu"])
def test_another_boot_or_qemu_races_again(
    change: str, tmp_path: Path, starts: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
):
    seed(tmp_path / "accel.json")
    (tmp_path / "boot_id").write_text("another-boot\n")
    match change:
        case "access":
            accel.KVM.write_text("")
        case "boot":
            monkeypatch.setattr(accel, "BOOT_ID", tmp_path / "boot_id")
        case "format":
            monkeypatch.setattr(accel, "FORMAT", 0)
        case "qemu":
            os.utime(tmp_path / "bin" / accel.QEMU, (1, 1))
    assert accel.probe(tmp_path / "accel.json", want="tcg") != SOME
    assert len(starts()) == 1


@needs_qemu
@pytest.mark.usefixtures("no_kvm")
@pytest.mark.parametrize(
    "damage",
    cases(
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(b'"factor": ', b'"factor": "x", "y": '),
        more=[
            lambda _: b"",
            lambda text: b"\xff\xfe" + text,
            lambda _: b"[]",
            lambda text: text.replace(b'"tcg"', b'"xen"'),
            lambda text: text.replace(b'"factor":', b'"speed":'),
        ],
    ),
)
def test_a_damaged_cache_file_is_as_good_as_none(
    damage: Callable[[bytes], bytes], tmp_path: Path, starts: Callable[[], list[str]]
):
    file = tmp_path / "accel.json"
    seed(file)
    file.write_bytes(damage(file.read_bytes()))
    found = accel.probe(file, want="tcg")
    assert found != SOME
    assert len(starts()) == 1
    assert json.loads(file.read_text())["answers"]["tcg"]["factor"] == found.factor


@needs_qemu
@pytest.mark.usefixtures("no_kvm")
def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    assert accel.probe(closed / "accel.json", want="tcg").name == "tcg"
    # Root may write anywhere, but not below a file.
    (tmp_path / "file").write_text("")
    assert accel.probe(tmp_path / "file" / "accel.json", want="tcg").name == "tcg"


@pytest.mark.usefixtures("no_kvm")
def test_kept_answers_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script(tmp_path / "bin" / accel.QEMU, "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(accel, "boot_id", lambda: "")
    seed(tmp_path / "accel.json")
    assert not (tmp_path / "accel.json").exists(), "an unknown boot is not kept"
    monkeypatch.setattr(accel, "boot_id", lambda: "known")
    seed(tmp_path / "accel.json")
    assert accel.probe(tmp_path / "accel.json") == SOME


@needs_qemu
@pytest.mark.usefixtures("no_kvm")
def test_kvm_asked_for_and_missing(tmp_path: Path):
    with pytest.raises(MachineError, match=r"kvm was asked for .* cannot open .*No such file.*kvm_intel") as caught:
        accel.probe(tmp_path / "accel.json", want="kvm")
    assert 'accel = "auto"' in caught.value.hint
    assert not (tmp_path / "accel.json").exists(), "a refusal is not kept, so that the remedy works at once"


def test_kvm_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    device = tmp_path / "kvm"
    device.write_text("")
    device.chmod(0)
    monkeypatch.setattr(accel, "KVM", device)
    if os.geteuid() == 0:
        assert accel.kvm_fault() == ""
        return
    assert accel.kvm_fault() == f"cannot open {device}: Permission denied; add yourself to group kvm"


@pytest.mark.parametrize("want", ["hvf", "xen", ""])
@pytest.mark.usefixtures("no_kvm")
def test_what_this_host_cannot_have(want: str, tmp_path: Path):
    with pytest.raises(MachineError, match="no accelerator"):
        accel.choose(want, tmp_path / "qemu")


def test_no_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingToolError, match="qemu-system-x86_64 is not installed"):
        accel.probe(tmp_path / "accel.json")


@pytest.mark.usefixtures("no_kvm")
@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("echo 'qemu-system-x86_64: broken' >&2; exit 1", "status 1: broken"),
        ("exit 33", "status 33: no output"),
        ("exec sleep 60", r"not done after 0\.[3-9]"),
        ("kill -TERM $$", "ended by signal 15"),
    ],
)
def test_a_qemu_that_cannot_emulate(does: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script(tmp_path / "bin" / accel.QEMU, does)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(accel, "TCG_LIMIT_S", 0.3)
    with pytest.raises(MachineError, match=says):
        accel.probe(tmp_path / "accel.json")
    assert not (tmp_path / "accel.json").exists()


def test_a_second_cpu_model_after_an_abort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """KVM here is a script: what is shown is the order of the models and the reason, on any machine."""
    fast = "printf B; printf E; exit 33"
    refuse = "echo 'qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69' >&2; kill -ABRT $$"
    script(
        tmp_path / accel.QEMU,
        f'case "$*" in\n*"-accel tcg"*) printf B; sleep 0.3; printf E; exit 33;;\n'
        f'*"-cpu host "*) {refuse};;\n*) {fast};;\nesac',
    )
    monkeypatch.setattr(accel, "KVM", tmp_path / accel.QEMU)
    monkeypatch.setattr(sys, "platform", "linux")
    found = accel.choose("auto", tmp_path / accel.QEMU)
    assert (found.name, found.cpu) == ("kvm", "host,-arch-capabilities")
    assert found.reason.endswith("(QEMU aborts with -cpu host: error: failed to set MSR 0x10a to 0x69)")


BASELINE = Run(33, 0.5, 0.3, "")


@pytest.mark.parametrize(
    ("run", "works", "faster", "reason"),
    [
        (Run(33, 0.2, 0.03, ""), True, True, "kvm did in 0.03 s what emulation did in 0.30 s"),
        (Run(33, 1.4, 0.4, ""), True, False, "kvm did in 0.40 s what emulation did in 0.30 s"),
        (
            Run(124, 2.0, None, "", timed_out=True),
            False,
            False,
            "kvm did not finish in 2.0 s what emulation did in 0.50 s",
        ),
        (Run(124, 0.2, None, ""), False, False, "kvm did not run a boot sector: QEMU ended with status 124: no output"),
        (
            Run(0, 0.2, None, "\n"),
            False,
            False,
            "kvm did not run a boot sector: QEMU ended with status 0: no output",
        ),
        (
            Run(1, 0.1, None, "qemu-system-x86_64: invalid accelerator kvm\nmore"),
            False,
            False,
            "kvm did not run a boot sector: QEMU ended with status 1: invalid accelerator kvm",
        ),
    ],
)
def test_the_comparison(run: Run, works: bool, faster: bool, reason: str):  # noqa: FBT001
    result = accel.compare("kvm", "host", run, BASELINE, limit_s=2)
    assert (result.works, result.faster, result.accel.reason) == (works, faster, reason)


@pytest.mark.parametrize(
    ("loop_s", "factor"), [(None, 1), (0.001, 1), (0.033, 1), (0.066, 2), (0.2, 6.1), (0.33, 10), (60, 10)]
)
def test_slowdown(loop_s: float | None, factor: float):
    assert accel.slowdown(Run(33, 1, loop_s, "")) == factor


@pytest.mark.parametrize(
    ("emulated_s", "limit_s"), [(0.2, 1.5), (0.36, 1.5), (0.5, 2.0), (0.64, 2.56), (1, 2.2), (5, 1.5)]
)
def test_limit(emulated_s: float, limit_s: float):
    assert accel.limit(emulated_s) == pytest.approx(limit_s)


def members(group: str) -> list[str]:
    """The processes of a group, but for those that only wait to be reaped."""
    listing = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True, timeout=10)
    return [row for row in listing.stdout.splitlines() if row.split()[0] == group and "Z" not in row.split()[1]]


@pytest.mark.parametrize("wrapper", ["exec sleep 60", "sleep 60; exit 0"], ids=["exec", "child"])
def test_an_interrupted_race_leaves_nothing(wrapper: str, tmp_path: Path):
    script(tmp_path / "bin" / accel.QEMU, f"echo $$ >{tmp_path}/pid\n{wrapper}")
    cache = str(tmp_path / "accel.json")
    code = f"from pathlib import Path; from vmtasks.qemu import accel; accel.probe(Path({cache!r}))"
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    with process.spawn([sys.executable, "-c", code], env=env, pipe=True) as child:
        deadline_s = time.monotonic() + 20
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in child.communicate(timeout=20)[1]
    group = (tmp_path / "pid").read_text().strip()
    deadline_s = time.monotonic() + 5  # a process that has been killed may take a moment to go
    while left := members(group):
        assert time.monotonic() < deadline_s, left
        time.sleep(0.05)
    assert not (tmp_path / "accel.json").exists()
