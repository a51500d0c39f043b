"""Suites in a guest that is not to be trusted, that wedges or goes away, and several runs at once."""

import json
import os
import re
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from conftest import Doit, Project, until
from vmtasks.qemu import qmp

pytestmark = pytest.mark.timeout(600)

OUTSIDE = "secret of this host\n"
HOSTILE = r"""
mkdir -p out/deep hidden
echo fine >out/fine; echo deep >out/deep/file
echo '1..1' >output.log; echo 'ok 1 - forged' >>output.log; cp output.log out/output.log
ln -s OUTSIDE out/to-file; ln -s /dev/zero out/endless; ln -s /nowhere out/dangling
ln -s FOLDER out/to-folder
mkfifo out/fifo
truncate -s 3G out/huge
printf x >"$(printf 'out/two\nlines')"; printf x >"$(printf 'out/\033]0;title\007')"
echo not ok 1 - really
echo 1..1
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Project]:
    project = Project(tmp_path_factory.mktemp("suites") / "project", store)
    project.doit("start").good()
    yield project
    project.clean_up()


@pytest.fixture
def project(made: Project) -> Project:
    """The project, with the machine that all tests share. A test that ends the machine need not start it again."""
    return made


def suites(project: Project, text: str, *quick: str) -> None:
    """These suites, in place of those that a test before has written; `quick` runs those that are named."""
    path = project.root / "config/vm.toml"
    before = path.read_text().partition("# here\n")[0]
    before = re.sub(r"(?m)^suites = \[.*?\]", f"suites = {json.dumps(quick)}", before)
    path.write_text(f"{before}# here\n{text}")


def report(project: Project, name: str) -> ET.Element:
    return ET.parse(project.state / "results" / f"{name}.xml").getroot()  # noqa: S314 - ours


def record(project: Project, name: str) -> dict[str, object]:
    return tomllib.loads((project.state / "results" / f"{name}.toml").read_text())


@pytest.mark.exhaustive
def test_what_a_hostile_guest_leaves_touches_no_file_of_this_host(project: Project) -> None:
    """Nothing but plain files and folders comes out, and the verdict is that of the output, not of an artifact."""
    outside = project.root / "outside"
    outside.mkdir()
    (outside / "file").write_text(OUTSIDE)
    script = project.root / "examples/project/hostile.sh"
    script.write_text(HOSTILE.replace("OUTSIDE", str(outside / "file")).replace("FOLDER", str(outside)))
    suites(
        project,
        """
[suites.hostile]
command = "sh ./hostile.sh"
artifacts = ["*.log", "out", "nothing-*"]
artifacts_limit = "1M"
""",
    )
    output = project.doit("test:hostile").bad()
    script.unlink()
    folder = project.state / "results" / "hostile"
    assert "1 failed" in output
    assert "not ok 1 - really" in (folder / "output.log").read_text()
    got = {str(path.relative_to(folder / "artifacts")) for path in (folder / "artifacts").rglob("*")}
    assert got == {
        *("output.log", "out", "out/fine", "out/deep", "out/deep/file", "out/output.log"),
        *("out/two\nlines", "out/\x1b]0;title\x07"),
    }
    assert all((path.is_file() or path.is_dir()) and not path.is_symlink() for path in folder.rglob("*"))
    for name in ("to-file", "to-folder", "endless", "dangling", "fifo"):
        assert f"out/{name}: left in the guest" in output
    assert "out/huge: left in the guest: it is larger than 1M" in output
    assert "nothing-*: there is nothing of this name in the guest" in output
    assert "\x1b]0" not in output
    assert (outside / "file").read_text() == OUTSIDE
    assert len(list(outside.iterdir())) == 1


@pytest.mark.exhaustive
def test_suites_that_only_seem_to_be_fine_and_others_that_only_seem_not_to_be(project: Project) -> None:
    """All in one run, in the order in which they are written, whatever the order of their names."""
    outside = project.root / "outside.xml"
    outside.write_text('<testsuite><testcase name="secret"/></testsuite>')
    names = ["z_none", "a_link", "m_folder", "b_own", "y_deadline", "c_counts"]
    suites(
        project,
        f"""
[suites.z_none]
command = "true"
junit = "none.xml"
[suites.a_link]
command = "ln -s {outside} report.xml"
junit = "report.xml"
[suites.m_folder]
command = "mkdir -p out; rm -rf out/link; ln -s {outside.parent} out/link"
junit = "out/link/outside.xml"
[suites.b_own]
command = "mkdir -p out; rm -rf out/link; echo '<testsuite><testcase name=\\"x\\"/></testsuite>' >out/own.xml"
junit = "out/own.xml"
[suites.y_deadline]
command = "timeout 1 sleep 5; exit 124"
[suites.c_counts]
command = "echo ok 3 files copied"
""",
        *names,
    )
    output = project.doit("-a", "quick").bad()
    places = [output.index(f"test:{name}: ") for name in names]
    assert places == sorted(places)
    assert "the suite was to write the JUnit file none.xml: there is nothing of this name in the guest" in output
    assert "JUnit file report.xml: left in the guest: it is a link, or not a regular file" in output
    assert "JUnit file out/link/outside.xml: there is nothing of this name in the guest" in output
    assert "1 failed" in output
    assert "(status 124)" in output
    assert "its deadline" not in output
    assert "secret" not in "".join(path.read_text() for path in (project.state / "results").glob("*.xml"))
    statuses = {name: record(project, name)["status"] for name in names}
    assert statuses == {"z_none": 1, "a_link": 1, "m_folder": 1, "b_own": 0, "y_deadline": 124, "c_counts": 0}


WAITS = """
[suites.waits]
command = "echo begun; test -e /tmp/pass || sleep 4321"
"""


def begun(project: Project) -> Doit:
    """A run of a suite that was green, and now has begun again; nothing says any more that it is green."""
    suites(project, WAITS)
    project.ssh("touch /tmp/pass")
    project.doit("-a", "test:waits").good()
    assert record(project, "waits")["status"] == 0
    project.ssh("rm /tmp/pass")
    run = project.start("-a", "test:waits")
    run.wait_for("\nbegun")  # not in the title
    assert "the run has not ended" in ET.tostring(report(project, "waits")).decode()
    return run


@pytest.mark.exhaustive
def test_a_run_that_is_killed_leaves_no_green_result_and_no_job(project: Project) -> None:
    begun(project).kill()
    assert "the run has not ended" in ET.tostring(report(project, "waits")).decode()
    assert record(project, "waits")["status"] != 0
    assert "sleep 4321" in project.ssh("ps -o args").stdout
    project.ssh("touch /tmp/pass")
    assert "begun" in project.doit("test:waits").good(), "it is stale"
    assert "sleep 4321" not in project.ssh("ps -o args").stdout


@pytest.mark.exhaustive
def test_a_run_that_is_interrupted_says_so(project: Project) -> None:
    run = begun(project)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait().status not in (0, 1)
    assert "interrupted by SIGINT" in ET.tostring(report(project, "waits")).decode()
    assert "begun" in ET.tostring(report(project, "waits")).decode()
    assert "sleep 4321" not in project.ssh("ps -o args").stdout


ALONE = """
[suites.one]
command = "mkdir busy && echo one ran && sleep 1 && rmdir busy"
[suites.two]
command = "mkdir busy && echo two ran && sleep 1 && rmdir busy"
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(("runs", "words"), [(2, ("-a",)), (4, ())])
def test_runs_at_once_wait_for_each_other_and_all_end_right(
    project: Project, runs: int, words: tuple[str, ...]
) -> None:
    suites(project, ALONE, "one", "two")
    project.append("examples/project/README.md", "more\n")
    under_way = [project.start(*words, "quick") for _ in range(runs)]
    outputs = [run.wait().good() for run in under_way]
    assert sum("; waiting" in output for output in outputs) >= runs - 1
    for name in ("one", "two"):
        assert 1 <= sum(f"\n{name} ran" in output for output in outputs) <= (runs if words else 1)
        assert record(project, name)["status"] == 0
        assert all(f"test:{name}: 1 passed" in output for output in outputs)


@pytest.mark.exhaustive
def test_a_build_that_fails_is_one_error_and_no_result_of_before_stays(project: Project) -> None:
    suites(project, '[suites.one]\ncommand = "echo one ran"\n')
    project.doit("-a", "test:one").good()
    project.edit("config/vm.toml", 'command = "make"  ', 'command = "echo noise; exit 3"  ')
    try:
        output = project.doit("test:one", "test:unit").bad()
        assert output.count("exited with 3") == 3
        assert "test:one: echo" not in output
        found = {path.stem: report(project, path.stem) for path in (project.state / "results").glob("*.xml")}
        errors = {name: len(root.findall(".//error")) for name, root in found.items()}
        assert errors["_build"] == 1
        assert "noise" in ET.tostring(found["_build"]).decode()
        assert "one" not in errors
    finally:
        project.edit("config/vm.toml", 'command = "echo noise; exit 3"  ', 'command = "make"  ')
    project.doit("test:one").good()
    assert not (project.state / "results/_build.xml").exists()
    assert not (project.state / "results/_build").exists()


@pytest.mark.exhaustive
def test_a_guest_that_stands_still_is_the_suites_result(project: Project) -> None:
    """Its deadline passes, and nothing in it can be ended: minutes, as each question to it is given time."""
    suites(project, WAITS.replace("command", "timeout_s = 20\ncommand"))
    run = project.start("-a", "test:waits")
    run.wait_for("\nbegun")
    control = (project.state / "run/tiny/tiny-monitor.socket").resolve()
    with qmp.connect(control, timeout_s=20) as monitor:
        monitor.cmd("stop")
    try:
        output = run.wait(600).bad()
    finally:
        with qmp.connect(control, timeout_s=20) as monitor:
            monitor.cmd("cont")
    trouble = str(record(project, "waits")["trouble"])
    assert trouble
    assert trouble in output
    assert len(report(project, "waits").findall(".//error")) == 1
    project.ssh("touch /tmp/pass")
    assert "begun" in project.doit("test:waits").good()
    assert "sleep 4321" not in project.ssh("ps -o args").stdout


@pytest.mark.exhaustive
def test_a_machine_that_is_lost_is_the_suites_result(project: Project) -> None:
    run = begun(project)
    for pid in project.qemus():
        os.kill(pid, signal.SIGKILL)
    until(lambda: not project.qemus(), 20, "QEMU to end")
    output = run.wait().bad()
    trouble = record(project, "waits")["trouble"]
    assert trouble
    assert str(trouble) in output
    assert str(trouble) in report(project, "waits").findall(".//error")[0].get("message", "")
