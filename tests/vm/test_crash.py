"""SIGKILL at random moments: nothing is left running, nothing half-made is believed, no finished image is lost."""

import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Doit, Project, qemus, until
from vmtasks.store.store import Store

pytestmark = pytest.mark.timeout(600)

SEED = int(os.environ.get("VMTASKS_TEST_SEED", "11"))
KILLS = 5
VICTIMS = ("doit", "qemu", "both")
LATEST_S = 13.0
GONE_S = 3.0


@pytest.fixture
def crashing(tmp_path: Path, bare_store: Path) -> Iterator[Project]:
    """A project on a store with no image in it."""
    made = Project(tmp_path / "project", bare_store)
    yield made
    made.clean_up()


def phases(project: Project) -> list[int]:
    """QEMUs of phases. A machine's outlives its doit, and is meant to."""
    machines = set(qemus(project.state / "run"))
    return [pid for pid in project.qemus() if pid not in machines]


def strike(project: Project, run: Doit, victim: str) -> None:
    """Kill doit, or whatever QEMU runs, or first one and then the other."""
    if victim in ("qemu", "both"):
        for pid in project.qemus():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if victim in ("doit", "both"):
        run.kill()


def intact(project: Project) -> None:
    """Whatever the store has a record of is there, to the last byte."""
    store = Store(project.store)
    for digest in project.published():
        record, why = store.find(digest, look="bytes")
        assert record is not None, why


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("half", [1, 2])
def test_killed_at_random_moments(crashing: Project, half: int) -> None:
    project = crashing
    dice = random.Random(SEED + half)  # noqa: S311 - to be repeated with VMTASKS_TEST_SEED
    done: dict[str, int] = {}
    story = [f"VMTASKS_TEST_SEED={SEED}"]
    try:
        for _ in range(KILLS):
            victim, moment_s = dice.choice(VICTIMS), dice.uniform(0.3, LATEST_S)
            run = project.start("auto_install", "quick")
            with contextlib.suppress(AssertionError):
                until(lambda run=run: run.process.poll() is not None, moment_s, "the moment")
            strike(project, run, victim)
            published = project.published()
            if victim == "qemu":
                ended = run.wait(60)
                assert "Traceback" not in ended.output, ended.output
            until(lambda: not phases(project), GONE_S, "the phase's QEMU to go with its doit")
            story.append(f"{moment_s:.1f} s, {victim}: {run.output.strip().splitlines()[-1:]}")
            boots = Counter(boot.digest for boot in project.boots())
            assert {digest: boots[digest] for digest in done} == done, "what was published has booted again"
            done |= {digest: boots[digest] for digest in published}
            intact(project)
        project.doit("auto_install", "quick", timeout_s=900).good()
        boots = Counter(boot.digest for boot in project.boots())
        assert {digest: boots[digest] for digest in done} == done, "what was published has booted again"
        intact(project)
        assert set(project.results()) == {"unit.xml", "mount.xml"}
        left = [p.name for p in (project.store / "images").iterdir() if p.suffix not in (".qcow2", ".toml")]
        assert left == []
    except BaseException:
        print("\n".join(story))  # noqa: T201 - for whoever must repeat it
        raise


@pytest.mark.exhaustive
def test_killed_between_the_image_and_its_record(tmp_path: Path, full_store: Path) -> None:
    """An image that was named and has no record yet is not believed: it is made again, and nothing else is."""
    project = Project(tmp_path / "project", full_store)
    project.doit("auto_install").good()
    digest = project.digest(3)
    image = project.image(3)
    image.with_suffix(".toml").unlink()
    project.doit("auto_install").good()
    assert [boot.digest for boot in project.boots()] == [digest]
    assert image.exists(), "an overlay may stand on it"
    intact(project)
    project.clean_up()


@pytest.mark.exhaustive
def test_a_qemu_that_no_record_knows_is_ended(project: Project) -> None:
    """As doit leaves it that is killed after it has started a machine and before it has said so."""
    project.doit("start").good()
    (old,) = project.qemus()
    record = project.state / "run/tiny/machine.toml"
    text = record.read_text()
    record.write_text(text.replace(f"pid = {old}\n", "pid = 0\n"))
    project.doit("start").good()
    (new,) = project.qemus()
    assert new != old
    record.write_text(record.read_text().replace(f"pid = {new}\n", "pid = 0\n"))
    assert "machine tiny stopped (power off in the guest)" in project.doit("stop").good()
    until(lambda: not project.qemus(), GONE_S, "QEMU to end")
