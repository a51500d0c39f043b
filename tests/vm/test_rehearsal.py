"""The real DragonFly phases on a stand-in of DragonFly: they install it, and no command fails without being heard.

tests/rehearsal/README.md says what that proves and what not.
"""

import multiprocessing
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from amount import exhaustive
from conftest import Project, free_port
from httpserver import serving
from rehearsal import inject, media, transcript
from rehearsal.inject import Order, Outcome
from rehearsal.transcript import Transcript
from vmtasks.config.load import load
from vmtasks.errors import CommandTimeoutError
from vmtasks.guest import job
from vmtasks.guest.link import Link
from vmtasks.machines import Machine

pytestmark = pytest.mark.timeout(900)

GOLDEN = media.HERE / "golden"
PHASES = {1: "1-install", 2: "2-packages", 3: "3-provision"}
AT_A_TIME = 2


@dataclass
class Rehearsal:
    """The installed stand-in: its project, what it was installed from, and what each phase's console said."""

    project: Project
    release: media.Release
    work: Path
    asked: list[str]
    transcripts: dict[int, Transcript]
    ordered: int = field(default=0)

    def another(self, name: str) -> "DragonFly":
        """A second project on the same store and installer, to change."""
        project = DragonFly(self.work / name, self.project.store, self.release)
        project.mirror = "http://127.0.0.1:9/"  # nobody is there: the installer is in the store
        return project

    def boots(self, orders: Sequence[Order]) -> list[Outcome]:
        """Boot each order, two at a time, on the images that the good run has left."""
        first = self.ordered
        self.ordered += len(orders)
        pool = ProcessPoolExecutor(AT_A_TIME, mp_context=multiprocessing.get_context("spawn"))
        try:
            jobs = [
                pool.submit(inject.boot, self.project.root, self.project.env(), self.work / f"told-{first + n}", order)
                for n, order in enumerate(orders)
            ]
            return [job.result() for job in jobs]
        finally:
            pool.shutdown(cancel_futures=True)


class DragonFly(Project):
    """A scratch project with the DragonFly guest, on a store of its own; a mirror of this host has its release."""

    mirror = ""

    def __init__(self, root: Path, store: Path, release: media.Release) -> None:
        """Copy the project; the digests of the made-up release replace those of the real one, and nothing else."""
        super().__init__(root, store)
        phases = root / "phases/dragonfly"
        shutil.copytree(media.HERE.parents[1] / "phases/dragonfly", phases)
        self.edit("config/vm.toml", 'guest = "tiny"', 'guest = "dragonfly"')
        text = (phases / "guest.toml").read_text()
        lines = "".join(f'    "{digest}",\n' for digest in release.digests)
        text, count = re.subn(r'(?ms)^"6\.4\.2" = \[.*?^\]$', f'"6.4.2" = [\n{lines}]', text, count=1)
        assert count == 1
        (phases / "guest.toml").write_text(text)
        self.name, self.tiny = "dragonfly-6.4.2", self.state / "dragonfly-6.4.2"

    def env(self) -> dict[str, str]:
        """Less memory and one processor: no phase depends on them."""
        return {**super().env(), "DFLY_MIRROR": self.mirror, "VM_CPUS": "1", "VM_MEMORY": "256M"}


@pytest.fixture(scope="module")
def rehearsal(installer_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    """Compose the CD, publish it on a mirror, and install from there with the project's own command."""
    work = tmp_path_factory.mktemp("rehearsal")
    iso = media.compose_iso(installer_store / "packages", work / "guest", work / "standin.iso")
    release = media.release(iso)
    own = work / "store"
    own.mkdir()
    if (installer_store / "accel.json").exists():
        shutil.copy2(installer_store / "accel.json", own)
    project = DragonFly(work / "project", own, release)
    with serving({media.NAME: release.packed}) as site:
        project.mirror = f"{site.base}/"
        project.doit("auto_install", timeout_s=400).good()
        asked = [asked.path for asked in site.asked]
    transcripts = {n: transcript.read(project.tiny / f"logs/{name}.console.log") for n, name in PHASES.items()}
    yield Rehearsal(project, release, work, asked, transcripts)
    project.clean_up()


def test_the_three_phases_install_it(rehearsal: Rehearsal) -> None:
    """From the mirror's file to the clean snapshot; the stand-in saw nothing that it does not know."""
    assert rehearsal.asked == [media.NAME]
    assert [boot.phase for boot in rehearsal.project.boots()] == list(PHASES.values())
    assert len(rehearsal.project.published()) == 3
    for number, name in PHASES.items():
        seen = rehearsal.transcripts[number]
        assert seen.findings == (), name
        assert seen.made_to_fail == ()
        assert seen.calls


@pytest.mark.parametrize("number", PHASES)
def test_the_commands_are_those_of_the_record(rehearsal: Rehearsal, number: int, pytestconfig: pytest.Config) -> None:
    """After a change of a phase: `pytest tests/vm/test_rehearsal.py --remake-golden`, and look at the difference."""
    seen, path = rehearsal.transcripts[number], GOLDEN / f"{PHASES[number]}.txt"
    if pytestconfig.getoption("--remake-golden", default=False):
        path.write_text(seen.golden(PHASES[number]))
    assert transcript.differences(path.read_text(), seen, PHASES[number]) == []


@pytest.mark.sampled
@pytest.mark.timeout(7200)
def test_every_failing_command_is_reported(
    rehearsal: Rehearsal, pytestconfig: pytest.Config, record_property: Callable[[str, object], None]
) -> None:
    """A command that fails, now and whenever it is tried again, ends its phase: status, step, power off, no image.

    One of each phase in each run, another every day, or all of them.
    """
    orders = []
    seed = pytestconfig.getoption("--seed", default=None) or datetime.now(UTC).toordinal()
    chance = random.Random(seed)  # noqa: S311
    for number, seen in rehearsal.transcripts.items():
        calls = list(seen.calls)
        if not exhaustive(pytestconfig):
            calls = chance.sample(calls, 1)
        orders += [(call, Order(number, call.line, call.occurrence, chance.choice([1, 64, 75, 127]))) for call in calls]
    before = rehearsal.project.published()
    problems = injected(rehearsal, orders)
    # Once more what went wrong, with a calmer host: a command whose failure is lost is lost again.
    problems = injected(rehearsal, [pair for pair in orders if pair in problems])
    reported = len(orders) - len(problems)
    counts = f"commands made to fail: {len(orders)}, reported as they must be: {reported}; --seed {seed}"
    record_property("counts", counts)
    assert list(problems.values()) == []
    assert rehearsal.project.published() == before


Injected = tuple[transcript.Call, Order]


def injected(rehearsal: Rehearsal, orders: Sequence[Injected]) -> dict[Injected, str]:
    """Boot once for each order; what went wrong with those whose failure was not reported as it must be."""
    outcomes = rehearsal.boots([order for _, order in orders])
    told = {pair: "; ".join(unheard(pair[0], outcome)) for pair, outcome in zip(orders, outcomes, strict=True)}
    return {
        (call, order): f"phase {order.number}, {call.line!r} (time {call.occurrence}): {problem}"
        for (call, order), problem in told.items()
        if problem
    }


def unheard(call: transcript.Call, outcome: Outcome) -> Iterator[str]:
    """What is wrong with how a failure was reported."""
    if call.line not in outcome.made_to_fail:
        yield "it was not made to fail"
    if outcome.cause != "verdict":
        yield f"the cause is {outcome.cause or 'none: the phase was believed'} ({outcome.message})"
    elif not re.search(r"its script exited with [1-9]", outcome.message):
        yield f"there is no status in {outcome.message!r}"
    if not outcome.message.endswith(f" at step '{call.step}'"):
        yield f"the step is not {call.step!r} in {outcome.message!r}"
    if "reboot: Power down" not in outcome.text:
        yield "the guest did not power itself off"
    if outcome.published:
        yield "an image was published"
    yield from outcome.findings


@pytest.mark.exhaustive
def test_the_loader_on_a_bad_line(rehearsal: Rehearsal, store: Path) -> None:
    """QEMU's own serial line: a loader that is late and slow, and one that loses keys. More: test_dialogue.py."""
    first = rehearsal.transcripts[1].calls[0]
    orders = []
    for number, manner in enumerate(("late=4000 slow=150", "deaf=1 lose=30")):
        work = rehearsal.work / f"manner-{number}"
        iso = media.compose_iso(store / "packages", work, work.with_suffix(".iso"), manner=manner)
        orders.append(Order(1, first.line, installer=iso))
    for outcome in rehearsal.boots(orders):
        # The console is the serial one, so what was typed has arrived; the first command was told to fail.
        assert outcome.cause == "verdict", (outcome.message, outcome.text)
        assert outcome.made_to_fail == (first.line,)
        assert "single user" not in outcome.text.rpartition("Booting in")[2]


@pytest.mark.exhaustive
def test_the_stand_ins_refuse_what_the_real_tools_refuse(rehearsal: Rehearsal) -> None:
    """A phase that checks that it is refused: so that the good run means something."""
    project = rehearsal.another("refusals")
    (project.root / "phases/dragonfly/2-packages.sh.j2").write_text((media.HERE / "refusals.sh").read_text())
    project.doit("phase:2").good()
    seen = transcript.read(project.tiny / "logs/2-packages.console.log")
    assert seen.findings == ()
    assert len(seen.calls) > 40


@pytest.mark.exhaustive
def test_a_wrong_root_is_told_as_what_it_is(rehearsal: Rehearsal) -> None:
    """The disk boots from what the script wrote into loader.conf, and from nothing else."""
    project = rehearsal.another("wrong root")
    project.edit(
        "phases/dragonfly/1-install.sh.j2", 'mountfrom="hammer2:${slice}d@ROOT"', 'mountfrom="hammer2:${slice}d@DATA"'
    )
    assert "found no root file system and asks for one" in project.doit("phase:2").bad()


@pytest.mark.exhaustive
def test_pkg_as_other_releases_have_it(rehearsal: Rehearsal) -> None:
    """Version 1.14 loses its repository when it replaces itself; a release may come without pkg. Both are got over."""
    lost, absent = rehearsal.boots([Order(2, pkg="1.14.4"), Order(2, pkg="absent")])
    for outcome in (lost, absent):
        assert (outcome.cause, outcome.message) == ("", ""), outcome.text[-3000:]
        assert outcome.published
        assert outcome.findings == ()
    assert "attempt to call a nil value" in lost.text
    assert "pkg bootstrap" in absent.text


@pytest.mark.exhaustive
def test_the_result_boots_and_is_used(rehearsal: Rehearsal) -> None:
    """A machine from the clean snapshot: SSH with the reported host key, doas, files both ways, a clean stop."""
    project = rehearsal.project
    project.port = free_port()
    project.doit("start").good()

    def said(command: str, *, user: str = "") -> str:
        done = project.ssh(command, user=user)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    assert said("uname -sr") == "DragonFly 6.4-RELEASE"
    assert said("echo $SHELL; id -u").split() == ["/usr/local/bin/bash", "0"]
    assert said("id -un; doas -n id -u", user="dev").split() == ["dev", "0"]
    assert said("ls -d /etc/rc.d/pfi /etc/pfi.conf /etc/defaults/pfi.conf 2>/dev/null | wc -l") == "0"
    assert said("grep -v '^#' /etc/master.passwd | cut -d: -f2 | sort -u") == "*"
    assert "installer" not in said("cat /etc/master.passwd")
    project.doit("sync").good()
    assert said("ls project/Makefile") == "project/Makefile"
    with Machine(load(project.root, {}, project.env())).link() as link:
        from_a_real_openssh(link)
    assert "stopped" in project.doit("stop").good()


def from_a_real_openssh(link: Link) -> None:
    """What differs from dropbear: it makes the group of a command itself. And root's shell is bash here."""
    assert link.open().server.startswith("SSH-2.0-OpenSSH")
    for _ in range(2):
        done = link.execute("echo a; echo b >&2; exit 42", timeout_s=60)
        assert (done.stdout, done.stderr, done.status) == (b"a\n", b"b\n", 42)
        assert link.execute("kill -KILL $$", timeout_s=60).signal == "KILL"
        with pytest.raises(CommandTimeoutError, match="it was ended"):
            link.execute("trap '' TERM; sleep 4711 & sleep 4711", timeout_s=3)
    end = job.run(link, ["printf", "%s", "it's $HOME"], timeout_s=60)
    assert (end.stdout, end.status) == (b"it's $HOME", 0)
    with pytest.raises(CommandTimeoutError, match="it was ended"):
        job.run(link, "sleep 4711", timeout_s=3)
    assert link.execute("ps -A -o args | grep '[s]leep 4711'", timeout_s=60).stdout == b""


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_verify_guest_answers_every_question(rehearsal: Rehearsal) -> None:
    """All of guest.toml's questions, from consoles, machine and mirror; the report is what somebody would send."""
    project = rehearsal.another("verify")
    sums = f"MD5 ({media.NAME}) = 0\nMD5 (dfly-x86_64-6.4.1_REL.iso.bz2) = 1\n".encode()
    with serving({media.NAME: rehearsal.release.packed, "md5.txt": sums}) as site:
        project.mirror = f"{site.base}/"
        status = project.doit("verify_guest", timeout_s=800).status
    report = (project.state / "report.md").read_text()
    (Path(project.root).parent / "report.md").write_text(report)
    stages = dict(re.findall(r"^\| ([^|]+?) \| (passed|failed|not reached) \|", report, re.MULTILINE))
    # The stand-in has no C compiler: the suites of the example cannot be built in it.
    assert [name for name, outcome in stages.items() if outcome != "passed"] == ["sync, build and quick suites"], report
    assert status == 1
    assert re.search(r"; (\d+) of \1 questions answered", report), report
