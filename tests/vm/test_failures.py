"""Each way in which a phase can fail: one sentence with the cause, the console's last lines, the log, a way to look."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import Ended, Project

pytestmark = pytest.mark.timeout(600)

NOTICED_S = 15.0
SLACK_S = 15.0
"""For a host that others load too: the limit holds on an idle one."""

INSTALL, PACKAGES = "phases/tiny/1-install.sh.j2", "phases/tiny/2-packages.sh.j2"
GUEST = "phases/tiny/guest.toml"


@pytest.fixture(autouse=True)
def _left_alone(project: Project) -> Iterator[None]:
    """Whatever fails: nothing that it led to is published, and no process and no half image is left.

    Other tests may save images in the same store meanwhile.
    """
    before = project.published()
    yield
    digests = {boot.digest for boot in project.boots()}
    assert not digests & (project.published() - before)
    assert project.qemus() == []
    assert not [
        path for path in (project.store / "images").iterdir() if path.name.partition(".")[0] in digests - before
    ]


def script(project: Project, path: str, text: str) -> None:
    """Put a script in the place of a phase's own."""
    (project.root / path).write_text(f"# shellcheck shell=sh\n{text}")


def limits(project: Project, *, silence_s: int = 0, total_s: int = 0) -> None:
    """Set the limits of all phases, in seconds of fast hardware: emulation makes them up to ten times as long."""
    file = project.root / GUEST
    text = file.read_text()
    if silence_s:
        text = re.sub(r"(?m)^silence_timeout_s = \d+", f"silence_timeout_s = {silence_s}", text)
    if total_s:
        text = re.sub(r"(?m)^timeout_s = \d+", f"timeout_s = {total_s}", text)
    file.write_text(text)


@dataclass(frozen=True)
class Told:
    """What a failed run told: the sentence, the console's last lines, the log, and the script to look inside."""

    sentence: str
    console: str
    log: Path
    look: Path


def told(project: Project, ended: Ended, number: int) -> Told:
    """Read the account of a failure, which must be whole."""
    output = ended.bad()
    name = {1: "1-install", 2: "2-packages"}[number]
    found = re.search(rf"(?m)^✗ phase:{number}: (phase {name} of tiny: .*)$", output)
    assert found, output
    console = "\n".join(re.findall(r"(?m)^ *\| (.*)$", output))
    log = re.search(r"(?m)^ *log: (.*)$", output)
    look = re.search(r"look inside with (\S+)", output)
    assert log, output
    assert look, output
    assert Path(log[1]).is_file()
    assert os.access(look[1], os.X_OK)
    assert not (project.tiny / f"phase-{number}.toml").exists()
    return Told(found[1], console, Path(log[1]), Path(look[1]))


def fail(project: Project, number: int = 1) -> Told:
    """Install, which must fail."""
    return told(project, project.doit("auto_install"), number)


def test_a_script_that_exits_7_at_its_second_step(project: Project) -> None:
    script(project, INSTALL, 'step "the first"\ntrue\nstep "the second"\necho before the end\n(exit 7)\necho never\n')
    seen = fail(project)
    assert "exited with 7" in seen.sentence
    assert "at step 'the second'" in seen.sentence
    assert "before the end" in seen.console
    assert "never" not in seen.console
    assert "before the end" in seen.log.read_text(errors="replace")


@pytest.mark.exhaustive
def test_a_script_that_hangs(project: Project) -> None:
    limits(project, silence_s=1)
    script(project, INSTALL, 'step "hang"\nsleep 1000000\n')
    seen = fail(project)
    assert re.search(r"the console was silent for [\d.]+ s at step 'hang'$", seen.sentence)
    assert "sleep 1000000" in seen.console


@pytest.mark.exhaustive
def test_a_script_that_talks_for_ever(project: Project) -> None:
    limits(project, total_s=1)
    script(project, INSTALL, 'step "talk"\nset +x\nwhile :; do echo talking; sleep 0.2; done\n')
    seen = fail(project)
    assert "did not finish within" in seen.sentence
    assert "talking" in seen.console or "silent" not in seen.sentence


@pytest.mark.exhaustive
def test_a_guest_that_powers_itself_off(project: Project) -> None:
    script(project, INSTALL, 'step "leave"\nbusybox poweroff -f\n')
    seen = fail(project)
    assert "powered off after it began, without a verdict at step 'leave'" in seen.sentence


@pytest.mark.exhaustive
def test_a_guest_that_reboots(project: Project) -> None:
    script(project, INSTALL, 'step "again"\nbusybox reboot -f\n')
    seen = fail(project)
    assert "rebooted without a verdict at step 'again'" in seen.sentence


@pytest.mark.exhaustive
def test_a_kernel_that_panics(project: Project) -> None:
    script(project, INSTALL, 'step "crash"\necho c >/proc/sysrq-trigger\n')
    seen = fail(project)
    assert "panicked (Kernel panic - not syncing: sysrq triggered crash) at step 'crash'" in seen.sentence
    assert "</TASK>" in seen.console, "the trace that followed"


@pytest.mark.exhaustive
def test_a_disk_without_a_loader(project: Project) -> None:
    """The first phase passes and leaves an empty disk; the second finds nothing to boot. Then the disk is looked at."""
    script(project, INSTALL, 'step "nothing"\ntrue\n')
    ended = project.doit("auto_install")
    first = project.boots()[0].digest
    seen = told(project, ended, 2)
    assert "the firmware found nothing to boot from" in seen.sentence
    assert [boot.phase for boot in project.boots()] == ["1-install", "2-packages"]
    for path in (project.store / "images").glob(f"{first}.*"):
        path.unlink()


@pytest.mark.exhaustive
def test_a_phase_cd_in_a_drive_where_pfi_does_not_look(project: Project) -> None:
    project.edit(GUEST, 'cds = ["installer", "phase", "installer"]', 'cds = ["installer", "installer", "phase"]')
    seen = fail(project)
    assert "booted to its login prompt without running the phase script" in seen.sentence
    assert "login:" in seen.console


@pytest.mark.exhaustive
def test_a_prompt_that_never_comes(project: Project) -> None:
    project.edit(
        GUEST,
        "expect = '(?m)^OK $'\nsend = \"boot\\r\"",
        "expect = 'nobody says this'\ntimeout_s = 1\nsend = \"boot\\r\"",
    )
    seen = fail(project)
    assert "'nobody says this', which did not come" in seen.sentence
    assert "OK" in seen.console


@pytest.mark.exhaustive
def test_a_qemu_that_is_killed_from_outside(project: Project) -> None:
    script(project, INSTALL, 'step "wait"\nsleep 1000000\n')
    run = project.start("auto_install")
    run.wait_for("1-install of tiny: wait")
    (pid,) = project.qemus()
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    seen = told(project, run.wait(), 1)
    assert time.monotonic() - began < NOTICED_S + SLACK_S
    assert "QEMU ended with signal 9 (Killed) while the guest was running at step 'wait'" in seen.sentence


@pytest.mark.exhaustive
def test_the_kept_disk_can_be_looked_at(project: Project) -> None:
    script(project, PACKAGES, 'step "stop here"\nexit 1\n')
    seen = fail(project, 2)
    assert seen.sentence.endswith("its script exited with 1 at step 'stop here'")
    kept = next(iter((project.store / "failed").glob(f"{project.boots()[-1].digest}.qcow2")))
    before = kept.stat().st_mtime_ns
    on_a_terminal([seen.look, "boot"], [("SYSLINUX", ""), ("login: ", LEAVE)])
    live = [
        ("Booting in", "9"),
        ("OK ", "set console=comconsole\r"),
        ("OK ", "boot\r"),
        ("login: ", "root\r"),
        ("# ", "mount /dev/sda1 /mnt && cat /mnt/etc/rc.conf\r"),
        ("hostname='tiny'", LEAVE),
    ]
    on_a_terminal([seen.look], live)
    assert kept.stat().st_mtime_ns == before


LEAVE = "\x01x"
"""Ctrl-A X: QEMU's own key."""


def on_a_terminal(argv: Sequence[str | Path], talk: Sequence[tuple[str, str]], timeout_s: float = 90) -> None:
    """Run a command on a terminal and talk to it as a person would: wait for a text, then type."""
    master, slave = pty.openpty()
    process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    text, since = "", ""
    deadline = time.monotonic() + timeout_s
    left = list(talk)
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    data = os.read(master, 65536).decode(errors="replace")
                    text, since = text + data, since + data
            if left and left[0][0] in since:
                since = since.partition(left[0][0])[2]
                for character in left.pop(0)[1]:
                    os.write(master, character.encode())
                    time.sleep(0.03)
        assert not left, f"waited for {left[0][0]!r}:\n{text}"
        assert process.poll() is not None, "Ctrl-A X ends QEMU"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(master)
