"""A project as `vmtasks init` begins it: what its sync leaves out, and the table of what runs again."""

import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from vmtasks.config.load import Config, load
from vmtasks.config.scaffold import scaffold
from vmtasks.images.workspace import PhaseRecord, Workspace
from vmtasks.store.records import write_record
from vmtasks.suites.results import ResultRecord, Results

ALWAYS = ["/.git/", "/.venv/", "__pycache__/", "/dodo.py"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An initialised project with a suite that has passed on the clean image."""
    root = tmp_path / "project"
    (root / "src").mkdir(parents=True)
    (root / "src/main.c").write_text("int main(void) { return 0; }\n")
    (root / "Makefile").write_text("test:\n\ttrue\n")
    scaffold(root, "tiny")
    passed(root)
    return root


def config_of(root: Path, **variables: str) -> Config:
    return load(root, variables, {"HOME": str(root.parent), "VMTASKS_STORE": str(root.parent / "store")})


def passed(root: Path, status: int = 0) -> None:
    """Leave the records of a run that has just ended."""
    config = config_of(root)
    write_record(Workspace(config).clean_record, PhaseRecord(digest="d", sha256="s"))
    results = Results(config)
    for name in config.suites:
        results.folder.mkdir(exist_ok=True)
        results.xml(name).touch()
        record = ResultRecord(
            key="", status=status, counts="1 failed", duration_s=1.0, finished=1.0, parts=results.parts(name)
        )
        write_record(results.folder / f"{name}.toml", record)


def edit(root: Path, name: str, old: str, new: str) -> None:
    path = root / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def add(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with (root / name).open("a") as file:
        file.write(text)


def image(root: Path) -> None:
    write_record(Workspace(config_of(root)).clean_record, PhaseRecord(digest="e", sha256="t"))


SUITE = '[suites.unit]\ncommand = "make test"'
ROWS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda root: root, ""),
    "a file in the synced tree": (lambda root: add(root, "src/main.c", "\n"), "changed: tree"),
    "a new file in the synced tree": (lambda root: add(root, "src/new.c", "\n"), "changed: tree"),
    "`command` of a suite": (
        lambda root: edit(root, "config/vm.toml", "make test", "make -k test"),
        "changed: command",
    ),
    "`env`": (lambda root: edit(root, "config/vm.toml", SUITE, SUITE + '\nenv = {A = "1"}'), "changed: env"),
    "`user`": (lambda root: edit(root, "config/vm.toml", SUITE, SUITE + '\nuser = "root"'), "changed: user"),
    "`cwd`": (lambda root: edit(root, "config/vm.toml", SUITE, SUITE + '\ncwd = "src"'), "changed: cwd"),
    "`format`": (lambda root: edit(root, "config/vm.toml", SUITE, SUITE + '\nformat = "tap"'), "changed: format"),
    "`artifacts`": (lambda root: edit(root, "config/vm.toml", SUITE, SUITE + '\nartifacts = ["x"]'), ""),
    "`[build]`": (lambda root: add(root, "config/vm.toml", '[build]\ncommand = "make"\n'), "changed: build.command"),
    "`sync.dest`": (lambda root: edit(root, "config/vm.toml", '"src"', '"there"'), "changed: sync.dest"),
    "a comment in `vm.toml`": (lambda root: add(root, "config/vm.toml", "# a comment\n"), ""),
    "`memory`": (lambda root: edit(root, "config/vm.toml", "[machine]", '[machine]\nmemory = "512M"'), ""),
    "the last phase's script": (lambda root: add(root, "phases/tiny/3-provision.sh.j2", "# a comment\n"), ""),
    "a comment in `guest.toml`": (lambda root: add(root, "phases/tiny/guest.toml", "# a comment\n"), ""),
    "a file below `files/` of the guest": (lambda root: add(root, "phases/tiny/files/root/etc/new", "x"), ""),
    "another guest": (lambda root: shutil.copytree(root / "phases/tiny", root / "phases/other"), ""),
    "`dodo.py`": (lambda root: add(root, "dodo.py", "# a comment\n"), ""),
    "the image": (image, "changed: image"),
    "what was built here": (lambda root: add(root, "build/main.o", "x"), ""),
    "`.vm/` removed": (lambda root: shutil.rmtree(root / ".vm"), "it has not run yet"),
    "a suite failed": (lambda root: passed(root, status=1), "it failed the last time (1 failed)"),
}


@pytest.mark.parametrize("row", ROWS)
def test_what_runs_again_in_an_initialised_project(row: str, project: Path) -> None:
    change, why = ROWS[row]
    assert Results(config_of(project)).why_stale("unit") == ""
    change(project)
    assert Results(config_of(project)).why_stale("unit") == why


@pytest.mark.parametrize("variable", ["memory", "cpus", "port", "accel", "network", "cache"])
def test_what_a_machine_is_given_makes_nothing_stale(variable: str, project: Path) -> None:
    values = {"memory": "512M", "cpus": "2", "port": "22225", "accel": "tcg", "network": "none", "cache": "unsafe"}
    assert Results(config_of(project, **{variable: values[variable]})).why_stale("unit") == ""


def excludes(root: Path) -> list[str]:
    exclude: list[str] = tomllib.loads((root / "config/vm.toml").read_text())["sync"]["exclude"]
    return exclude


def test_what_is_written_is_not_synced(tmp_path: Path) -> None:
    scaffold(tmp_path / "new", "tiny")
    assert excludes(tmp_path / "new") == [*ALWAYS, "/config/", "/phases/", "/build/"]
    walk = Results(config_of(tmp_path / "new")).walk()
    assert [name for name, _ in walk] == [b".gitignore"]


def test_what_the_project_has_already_is_synced(tmp_path: Path) -> None:
    root = tmp_path / "old"
    for name in ("config/app.ini", "phases/moon.c", "build/build.sh"):
        add(root, name, "x")
    scaffold(root, "tiny")
    sent = {name for name, info in Results(config_of(root)).walk() if info.st_mode & 0o100000}
    assert sent == {b".gitignore", b"config/app.ini", b"phases/moon.c", b"build/build.sh"}


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
@pytest.mark.parametrize("tracked", [True, False])
def test_a_build_folder_is_left_out_unless_git_tracks_it(tracked: bool, tmp_path: Path) -> None:  # noqa: FBT001
    root = tmp_path / "old"
    add(root, "build/main.o", "x")
    subprocess.run(["git", "init", "-q", root], check=True)
    if tracked:
        subprocess.run(["git", "-C", root, "add", "build"], check=True)
    scaffold(root, "tiny")
    assert ("/build/" in excludes(root)) is not tracked
