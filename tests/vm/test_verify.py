"""`doit verify_guest`: everything once, on tiny, with a question of each kind; and a report also when it fails."""

import re
import tomllib

import pytest
import tomli_w

from conftest import Project, qemus

QUESTIONS = [
    {"asks": "Which shell?", "observed": "shell *"},
    {"asks": "Who is root?", "command": "id -u; false"},
    {"asks": "Does the button work?", "host": "power-button"},
    {"asks": "Never seen?", "observed": "nothing of this name"},
]


def add_questions(project: Project) -> None:
    path = project.root / "phases/tiny/guest.toml"
    added = "".join(f"\n[[questions]]\n{tomli_w.dumps(question)}" for question in QUESTIONS)
    path.write_text(path.read_text() + added)
    script = project.root / "phases/tiny/3-provision.sh.j2"
    script.write_text(script.read_text() + '\nobserve "shell used here" sh -c "echo one; echo two; exit 3"\n')


@pytest.mark.exhaustive
def test_everything_is_tried_and_the_project_is_left_alone(project: Project) -> None:
    project.doit("auto_install").good()
    before = {number: project.digest(number) for number in (1, 2, 3)}
    add_questions(project)
    said = project.doit("verify_guest", timeout_s=480).good()
    report = (project.state / "report.md").read_text()
    assert "all stages passed; 3 of 4 questions answered." in report, report
    assert "[shell used here]\none\ntwo\n(status 3)" in report
    assert "### 2. Who is root?\n\n```text\n0\n(status 1)\n```" in report
    assert re.search(r"powered itself off \d+\.\d s after the button was pressed", report)
    assert re.search(r"\| sync, build and quick suites \| passed \| .* unit: 14 passed .* mount: 11 passed", report)
    assert f"report: {project.state / 'report.md'}" in said
    assert {number: project.digest(number) for number in (1, 2, 3)} == before
    assert not (project.state / "verify/run/verify").exists()
    assert not qemus(project.root)
    for number in (1, 2, 3):
        image = tomllib.loads((project.state / "verify/tiny" / f"phase-{number}.toml").read_text())
        assert image["digest"] != before[number]


@pytest.mark.exhaustive
def test_a_phase_that_fails_is_in_the_report(project: Project) -> None:
    script = project.root / "phases/tiny/1-install.sh.j2"
    script.write_text('step "look around"\nobserve "shell used here" id\nfail "this machine will not do"\n')
    said = project.doit("verify_guest").bad()
    assert "this machine will not do" in said
    report = (project.state / "report.md").read_text()
    assert "1-install: failed; 0 of 0 questions answered." in report
    assert report.count("| not reached |") == 9
    assert "this machine will not do" in report
    assert "### shell used here" in report
    assert not qemus(project.root)
