"""The whole way from an installer to results: what runs, and what does not run again."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import vmtasks.machines
from amount import exhaustive
from conftest import INSTALL_S, Ended, Project, copy_store, installing, is_installed, listeners
from vmtasks.errors import StateError

LOOPBACK = "0100007F"
THREE = ["1-install", "2-packages", "3-provision"]
INSTALL, ALL = ("auto_install",), ("auto_install", "quick")
PHASE_3 = "phases/tiny/3-provision.sh.j2"

pytestmark = pytest.mark.timeout(900)


@dataclass(frozen=True)
class FirstRun:
    """The run that installs, starts, syncs and tests; what the store held then, and addresses on which it listened."""

    project: Project
    ended: Ended
    published: set[str]
    listened: set[str]


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config, installer_store: Path
) -> Iterator[FirstRun]:
    """A project whose store has only the installer: the shared one, or a copy if others were first.

    A copy also for exhaustive tests, which damage images.
    """
    folder = tmp_path_factory.mktemp("pipeline")
    with installing(installer_store):
        own = installer_store
        if is_installed(own) or exhaustive(pytestconfig):
            own = copy_store(own, folder / "store", images=False)
        project, listened = Project(folder / "project", own), set()
        run = project.start(*ALL)
        while run.process.poll() is None and time.monotonic() - run.began < INSTALL_S:
            listened |= listeners([run.process.pid, *project.qemus()])
            time.sleep(0.2)
        made = FirstRun(project, run.wait(INSTALL_S), project.published(), listened)
    yield made
    project.clean_up()


@pytest.fixture
def project(first: FirstRun) -> Project:
    """The project after its first run. Each test leaves it as it was."""
    first.ended.good()
    return first.project


def test_the_first_run_ends_with_the_results_of_the_example(project: Project, first: FirstRun) -> None:
    assert [boot.phase for boot in project.boots()] == THREE
    assert first.published == {boot.digest for boot in project.boots()}
    counts = {}
    for name in ("unit", "mount"):
        suite = ET.parse(project.state / "results" / f"{name}.xml").getroot()  # noqa: S314 - ours
        cases = suite.findall(".//testcase")
        assert not suite.findall(".//failure")
        assert not suite.findall(".//error")
        counts[name] = len(cases)
    assert counts == {"unit": 14, "mount": 11}
    assert "14 passed" in first.ended.output
    assert "11 passed" in first.ended.output
    assert first.listened == {LOOPBACK}


def test_the_second_run_boots_nothing_and_runs_no_suite(project: Project) -> None:
    boots, results, pid = project.boots(), project.results(), project.machine()["pid"]
    output = project.doit(*ALL).good()
    assert "nothing has changed" in output
    assert "14 passed" in output, "the last result is shown"
    assert (project.boots(), project.results(), project.machine()["pid"]) == (boots, results, pid)


@pytest.mark.exhaustive  # with boot sectors: tests/unit/test_inputs.py
def test_one_byte_in_a_phase_boots_only_that_phase_and_back_nothing(project: Project) -> None:
    before, old = len(project.boots()), project.digest(3)
    project.append(PHASE_3, "#\n")
    project.doit(*INSTALL).good()
    assert [boot.phase for boot in project.boots()[before:]] == ["3-provision"]
    assert project.digest(3) != old
    text = (project.root / PHASE_3).read_text()
    (project.root / PHASE_3).write_text(text.removesuffix("#\n"))
    project.doit(*INSTALL).good()
    assert len(project.boots()) == before + 1
    assert project.digest(3) == old


@pytest.mark.parametrize("variable", ["memory=300M", "cpus=2", "port=auto", "name=other", "network=none"])
def test_what_the_machine_is_made_of_boots_no_phase(project: Project, variable: str) -> None:
    before = project.boots()
    project.doit(variable, *INSTALL).good()
    assert project.boots() == before


def test_a_changed_source_syncs_and_tests_only(project: Project) -> None:
    boots, results = project.boots(), project.results()
    project.append("examples/project/README.md", "more\n")
    output = project.doit(*ALL).good()
    assert "1 sent, 0 deleted" in output
    assert project.boots() == boots
    assert all(project.results()[name] > when for name, when in results.items())


@pytest.mark.exhaustive  # without a guest: tests/unit/test_sync.py
def test_what_is_gone_from_the_source_goes_from_the_guest(project: Project) -> None:
    extra = project.root / "examples/project/extra"
    extra.write_text("here\n")
    project.doit("sync").good()
    assert project.ssh("cat project/extra").stdout == "here\n"
    extra.unlink()
    assert "1 deleted" in project.doit("sync").good()
    assert project.ssh("cat project/extra").returncode != 0
    assert project.ssh("test -x project/build/ringlog").returncode == 0, "what is excluded stays"


def test_a_lost_database_boots_nothing_and_runs_no_suite(project: Project) -> None:
    project.doit("quick").good()
    boots, results = project.boots(), project.results()
    for path in project.state.glob("doit.sqlite3*"):
        path.unlink()
    project.doit(*ALL).good()
    assert (project.boots(), project.results()) == (boots, results)


def suite(project: Project, text: str) -> None:
    """Add suites to the project's configuration, in place of those that a test before has added."""
    path = project.root / "config/vm.toml"
    path.write_text(path.read_text().partition("# here\n")[0] + "# here\n" + text)


@pytest.mark.exhaustive
def test_a_failing_suite_runs_again_and_a_passing_one_does_not(project: Project) -> None:
    suite(
        project,
        """
[suites.bad]
command = "echo ran bad; exit 3"
[suites.good]
command = "echo ran good; echo $WORD >made.txt; mkdir -p out; echo a >out/a.txt; id -un >out/b.txt"
user = "root"
env = {WORD = "it's"}
artifacts = ["made.txt", "out/*"]
""",
    )
    output = project.doit("test:bad", "test:good").bad()
    assert "ran bad" in output
    assert "(status 3)" in output
    assert "ran good" in output, "one that fails does not keep the others from running"
    output = project.doit("test:bad", "test:good").bad()
    assert "ran bad" in output
    assert "ran good" not in output
    fetched = project.state / "results" / "good" / "artifacts"
    assert (fetched / "made.txt").read_text() == "it's\n"
    assert (fetched / "out/a.txt").read_text() == "a\n"
    assert (fetched / "out/b.txt").read_text() == "root\n"
    output = project.doit("test:bad", "test:good").bad()
    assert "ran bad" in output
    assert "ran good" not in output
    # By now the tree in the guest holds files of root's, which the next sync has removed.
    assert project.ssh("ls project").stdout.split() == ["Makefile", "README.md", "build", "src", "tests"]
    assert "ran good" in project.doit("-a", "test:good").good()
    bad = ET.parse(project.state / "results" / "bad.xml").getroot()  # noqa: S314 - ours
    assert len(bad.findall(".//failure")) + len(bad.findall(".//error")) == 1


@pytest.mark.exhaustive
def test_a_suite_says_itself_how_it_went(project: Project) -> None:
    report = (
        '<testsuite name=\\"own\\"><testcase name=\\"one\\"/><testcase name=\\"two\\"><failure/></testcase></testsuite>'
    )
    suite(
        project,
        f"""
[suites.own]
command = "echo '{report}' >own.xml"
junit = "own.xml"
[suites.tap]
command = "echo 1..2; echo ok 1 - a; echo not ok 2 - b"
""",
    )
    output = project.doit("test:own", "test:tap").bad()
    assert output.count("1 passed, 1 failed") >= 2, output
    names = ET.parse(project.state / "results" / "own.xml").getroot().findall(".//testcase")  # noqa: S314 - ours
    assert [case.get("name") for case in names] == ["one", "two"]
    project.edit("config/vm.toml", f"echo '{report}' >own.xml", "true")
    said = project.doit("test:own").bad()
    assert "the suite was to write the JUnit file own.xml: there is nothing of this name in the guest" in said, (
        "an old one"
    )


CHANGES: dict[str, tuple[Callable[[Project], object], str]] = {
    "a file of the tree": (lambda made: made.append("examples/project/src/ringlog.c", "\n"), "tree"),
    "its mode": (lambda made: (made.root / "examples/project/README.md").chmod(0o755), "tree"),
    "what sync excludes": (lambda made: made.append("examples/project/src/left.o", "x"), ""),
    "a suite's command": (lambda made: made.edit("config/vm.toml", '"make test"', '"make  test"'), "command"),
    "the build's command": (
        lambda made: made.edit("config/vm.toml", 'command = "make"  ', 'command = "make "  '),
        "build",
    ),
    "a comment in vm.toml": (lambda made: made.append("config/vm.toml", "# a comment\n"), ""),
    "a result": (lambda made: (made.state / "results/mount.xml").unlink(), "it has not run yet"),
    "nothing": (lambda _: None, ""),
}
"""Each input of the suites, and a word of the cause that `doit why` must name. Phases: tests/unit/test_why.py."""


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_what_why_names_of_the_suites_is_what_then_runs(
    project: Project, record_property: Callable[[str, object], None]
) -> None:
    project.doit("test:unit", "test:mount").good()
    wrong, words = [], ("test:unit", "test:mount")
    for name, (change, cause) in CHANGES.items():
        kept = (project.root / "config/vm.toml").read_text()
        change(project)
        steps = json.loads(project.doit("why", "--json", *words).good())["steps"]
        named = {step["name"] for step in steps if step["runs"] == "yes"}
        causes = [cause for step in steps for cause in step["causes"]]
        project.doit("-r", "json", "-o", "ran.json", *words).good()
        tasks = json.loads((project.root / "ran.json").read_text())["tasks"]
        ran = {task["name"] for task in tasks if task["started"]} & {step["name"] for step in steps}
        as_told = any(cause in text for text in causes) if cause else not named
        if named != ran or not as_told:
            wrong.append((name, sorted(named), sorted(ran), causes))
        (project.root / "config/vm.toml").write_text(kept)
        project.doit(*words).good()
    counts = f"changes tried {len(CHANGES)}, sets equal {len(CHANGES) - len(wrong)}"
    record_property("counts", counts)
    assert not wrong, counts


@pytest.mark.exhaustive
@pytest.mark.parametrize("user", ["", "root"])
def test_a_deadline_ends_in_the_guest_what_the_suite_has_started(project: Project, user: str) -> None:
    suite(
        project,
        f"""
[suites.slow]
command = "sleep 3131 & (sleep 3131; true) | sleep 3131"
user = "{user}"
timeout_s = 2
""",
    )
    output = project.doit("test:slow").bad()
    assert "ended at its deadline of 2 s" in output
    assert project.ssh("ps -o args | grep '[s]leep 3131'").stdout == ""


@pytest.mark.exhaustive
def test_a_build_that_fails_runs_no_suite(project: Project) -> None:
    project.edit("config/vm.toml", 'command = "make"  ', 'command = "make nothing-of-this-name"  ')
    try:
        output = project.doit("-a", "test:unit").bad()
    finally:
        project.edit("config/vm.toml", 'command = "make nothing-of-this-name"  ', 'command = "make"  ')
    assert "nothing-of-this-name" in output
    assert "suite unit was not run" in output
    assert "ok 1 - makes a ring" not in output


def test_state_that_was_removed_costs_no_boot(project: Project) -> None:
    project.doit("stop").good()
    boots = len(project.boots())
    assert boots
    shutil.rmtree(project.state)
    project.doit(*INSTALL).good()
    assert project.boots() == []
    assert (project.tiny / "clean.toml").exists()


@pytest.mark.exhaustive
def test_an_image_that_lost_a_byte_is_noticed_and_built_again(project: Project) -> None:
    project.doit(*INSTALL).good()
    before, image = len(project.boots()), project.image(2)
    image.chmod(0o644)
    size = image.stat().st_size
    with image.open("rb+") as file:
        file.truncate(size - 1)
    output = project.doit(*INSTALL).good()
    assert f"has {size - 1} bytes, its record says {size}" in output
    assert [boot.phase for boot in project.boots()[before:]] == ["2-packages", "3-provision"]
    project.doit("start").good()
    assert project.ssh("true").returncode == 0


@pytest.mark.exhaustive
def test_another_store_has_another_key_and_still_logs_in(tmp_path: Path, project: Project) -> None:
    other = copy_store(project.store, tmp_path / "store", images=True)
    shutil.rmtree(other / "keys")
    before = len(project.boots())
    project.doit("stop").good()
    output = project.doit("start", env={"VMTASKS_STORE": str(other)}).good()
    assert [boot.phase for boot in project.boots()[before:]] == ["3-provision"]
    assert "starts afresh" in output
    assert project.ssh("true").returncode == 0
    assert (other / "keys/id_ed25519").read_bytes() != (project.store / "keys/id_ed25519").read_bytes()


def test_outside_a_project_there_are_the_guests_as_they_come_with_vmtasks(
    tmp_path: Path, store: Path, bare_store: Path
) -> None:
    """The store has the image, and what it is called follows from the scripts that come with vmtasks alone."""
    environ = {"HOME": str(tmp_path), "VMTASKS_STORE": str(store)}
    machine = vmtasks.machines.Project(None, environ).create(vmtasks.machines.MachineSpec(image="tiny", name="a"))
    project = Project(tmp_path / "project", store)
    project.doit(*INSTALL).good()
    assert project.boots() == []
    assert machine.image().digest == project.digest(3)
    machine.remove()
    environ["VMTASKS_STORE"] = str(bare_store)
    with pytest.raises(StateError, match="as shipped with vmtasks: it lacks the image of phase 1-install") as caught:
        vmtasks.machines.Project(None, environ).create(vmtasks.machines.MachineSpec(image="tiny", name="a"))
    assert "vmtasks init DIR --guest tiny; cd DIR; doit auto_install" in caught.value.hint
