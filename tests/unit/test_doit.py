"""Real doit in a new project: odd folders, a damaged database, encodings, and what it prints of tasks."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

from amount import cases
from conftest import mounted_tmpfs
from vmtasks.config.scaffold import scaffold
from vmtasks.images.steps import Builder
from vmtasks.tasks import task_vmtasks
from vmtasks.tasks.actions.images import run_step
from vmtasks.tasks.actions.machines import EXIT
from vmtasks.tasks.actions.testing import go_test_output

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    scaffold(tmp_path / "project", "tiny")
    return tmp_path / "project"


def doit(
    project: Path, *words: str, through: Sequence[str] = (), **environ: str
) -> "subprocess.CompletedProcess[bytes]":
    env = {"HOME": str(project), "PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
    env |= {"VMTASKS_STORE": str(project / "store"), "VM_ACCEL": "tcg", **environ}
    return subprocess.run(
        [*through, sys.executable, "-m", "doit", *words],
        cwd=project, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60,
    )  # fmt: skip


def one_line(done: "subprocess.CompletedProcess[bytes]") -> str:
    """What a run said that had to be refused."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1, done.stderr
    return done.stderr.decode(errors="surrogateescape")


@pytest.mark.parametrize("place", ["file", "/dev/null", "file/below", "x" * 300, "a/" * 2100, "bad\udcff/../file"])
def test_a_state_folder_that_cannot_be(project: Path, place: str) -> None:
    (project / "file").touch()
    (project / "bad\udcff").mkdir()
    assert one_line(doit(project, "list", VM_DIR=place)).startswith("error: VM_DIR (dir=) = ")


def test_a_state_folder_that_is_read_only(project: Path, tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "ro", "1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        assert "not writable; name a folder that you may write to" in one_line(
            doit(project, "list", VM_DIR=str(folder))
        )


@pytest.mark.parametrize("place", cases("file", "bad\udcff", more=["/dev/null", "x" * 300, "/proc"]))
def test_a_store_that_cannot_be(project: Path, place: str) -> None:
    (project / "file").touch()
    done = doit(project, "start", VMTASKS_STORE=place)
    assert b"Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert done.returncode == 1
    done = doit(project, "check_prereqs", VMTASKS_STORE=place)
    assert b"Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert doit(project, "list", VMTASKS_STORE=place).returncode == 0


def test_folders_are_for_nobody_else(project: Path) -> None:
    doit(project, "list").check_returncode()
    assert [(project / name).stat().st_mode & 0o777 for name in (".vm", "store")] == [0o700, 0o700]


# -- the database


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(8000))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:8192] = os.urandom(4096)
    path.write_bytes(data)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("damage", cases(garbage, folder, more=[half, damaged_page, link]))
def test_a_database_that_cannot_be_read_is_set_aside(project: Path, damage: Callable[[Path], object]) -> None:
    doit(project, "clean_phases", "help_vars").check_returncode()
    database = project / ".vm" / "doit.sqlite3"
    with sqlite3.connect(database) as known:
        known.execute("create table if not exists doit (task_id text not null, task_data text not null)")
        known.executemany("insert into doit values (?, ?)", [(f"t{n}", "{}" * 500) for n in range(40)])
    known.close()
    damage(database)
    for again in range(2):
        done = doit(project, "help_vars")
        assert done.returncode == 0, done.stdout + done.stderr
        told = b"it was set aside as doit.sqlite3.damaged" in done.stderr
        assert told == (again == 0), done.stderr
    assert os.path.lexists(database.with_name("doit.sqlite3.damaged"))


def test_a_database_that_another_run_holds_stays(project: Path) -> None:
    doit(project, "help_vars").check_returncode()
    database = project / ".vm" / "doit.sqlite3"
    with sqlite3.connect(database) as other:
        other.execute("create table if not exists doit (task_id text, task_data text)")
        other.commit()
        other.execute("begin exclusive")
        assert b"set aside" not in doit(project, "list").stderr
        other.rollback()
    other.close()


# -- text


@pytest.mark.parametrize("closed", cases("<&- >&- 2>&-", more=[">&-", "2>&-"]))
def test_streams_that_are_closed(project: Path, closed: str) -> None:
    for words in (["list"], ["help_vars"], ["info", "fetch"], ["status"]):
        script = f'"$@" {closed}'
        done = doit(project, *words, through=["sh", "-c", script, "sh"])
        assert b"Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        assert done.returncode == (EXIT["absent"] if words == ["status"] else words[0] == "info"), (words, done)


@pytest.mark.parametrize(
    "environ",
    cases({"LC_ALL": "POSIX", "PYTHONUTF8": "0"}, more=[{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}]),
)
def test_any_encoding_will_do(project: Path, environ: dict[str, str]) -> None:
    odd = project.with_name("\udcff\u20ac")
    shutil.copytree(project, odd)
    for words in (["check_prereqs"], ["help_vars"], ["list"]):
        done = doit(odd, *words, **environ)
        assert b"Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        assert b"UnicodeEncodeError" not in done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "vmtasks.cli", "doctor"], cwd=odd, capture_output=True, check=False, timeout=60,
        env={"HOME": str(odd), "PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "VM_ACCEL": "tcg", **environ},
    )  # fmt: skip
    assert b"Traceback" not in done.stdout + done.stderr, done.stderr
    assert b"qemu-img: " in done.stdout


def test_lone_surrogates_of_go_tests_are_shown() -> None:
    shown: list[bytes] = []
    go_test_output(shown.append)(b'{"Action":"output","Output":"a\\ud800b\\n"}\n')
    assert shown == [b"a?b\n"]


def test_every_action_exists_and_takes_the_options_of_its_task() -> None:
    seen = 0
    for task in task_vmtasks():
        options = [param["name"] for param in task.get("params", ())] + ([task["pos_arg"]] if "pos_arg" in task else [])
        for action in task.get("actions") or ():
            target, *arguments = action.args
            module, _, name = target.partition(":")
            function = getattr(import_module(module), name)
            if function is run_step:
                function, arguments = getattr(Builder, arguments[0]), ["self", *arguments[1:]]
            signature(function).bind(*arguments, **dict.fromkeys(options))
            seen += 1
    assert seen > 20


# -- what it prints


def test_info_is_for_people(project: Path) -> None:
    for task in ("fetch", "phase:1", "quick", "snapshot"):
        done = doit(project, "info", task)
        assert done.returncode in (0, 1), done.stderr
        for python in (b"<", b"args=", b"{'", b"nothing has changed"):
            assert python not in done.stdout, done.stdout
    assert b"status: stale" in done.stdout
    assert b"there is no record clean.toml" in done.stdout
    assert b"--name: name of a snapshot" in done.stdout
    assert doit(project, "info", "nosuch").stderr.startswith(b"ERROR: info: name one task")


@pytest.mark.parametrize("words", cases(["info", "quick"], more=[["list", "--all"], ["help", "start"], ["help_vars"]]))
def test_output_that_nobody_reads(project: Path, words: list[str]) -> None:
    doit(project, *words)
    reader, writer = os.pipe()
    os.close(reader)
    env = {"HOME": str(project), "PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", "doit", *words],
        cwd=project, env=env, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60,
    )  # fmt: skip
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode in (-signal.SIGPIPE, 128 + signal.SIGPIPE)


def test_a_state_is_told_from_what_doit_itself_says(project: Path) -> None:
    """1: a task failed; 2: an error; 3: words that it cannot parse."""
    assert doit(project, "status", "nosuch").returncode == 3
    assert len(set(EXIT.values())) == len(EXIT)
    assert {status for state, status in EXIT.items() if status <= 3} == {0}
