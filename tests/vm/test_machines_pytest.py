"""The pytest plugin as its user has it: a real pytest, in a project of its own, with tests that use the fixtures."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Project

PASSING = """
import socket
import time

import pytest

LIMIT_S = 30.0  # OpenSSH gives a dead connection up after 60 s


def ways_in(vm, tmp_path):
    (tmp_path / "in").write_text("x")
    for way in (
        lambda: vm.put(tmp_path / "in", "way/in"),
        lambda: vm.get("way/in", tmp_path / "out"),
        lambda: vm.wait_for_port(22),
        lambda: vm.succeed("true"),
    ):
        began = time.monotonic()
        way()
        assert time.monotonic() - began < LIMIT_S, vm.journal


def test_commands(vm_session):
    vm = vm_session
    assert vm.succeed("id -un").strip() == "dev"
    assert vm.succeed(["printf", "%s|", "a b", "$x", "it's", "-n", "é\\n"]) == "a b|$x|it's|-n|é\\n|"
    assert vm.succeed("id -u", user="root").strip() == "0"
    assert vm.fail("echo out; exit 3") == "out\\n"
    done = vm.execute("echo a; echo b >&2; exit 42", cwd="/tmp", env={"X": "1"}, stdin=b"in")
    assert (done.status, done.stdout, done.stderr) == (42, b"a\\n", b"b\\n")
    assert vm.execute("cat; pwd", cwd="/tmp", stdin=b"in\\n").stdout == b"in\\n/tmp\\n"
    assert vm.execute("kill -KILL $$").status == 137


def test_files_and_ports(vm_session, tmp_path):
    vm = vm_session
    (tmp_path / "a 'b").write_bytes(bytes(range(256)))
    vm.put(tmp_path / "a 'b", "there é")
    vm.get("there é", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == bytes(range(256))
    (tmp_path / "folder/inside").mkdir(parents=True)
    (tmp_path / "folder/inside/file").write_text("x")
    vm.put(tmp_path / "folder", "folder")
    assert vm.succeed("cat folder/inside/file") == "x"
    vm.put(tmp_path / "folder/inside/file", "app/deep/x")
    assert vm.succeed("cat app/deep/x; stat -c %a app app/deep") == "x755\\n755\\n"
    vm.put(tmp_path / "folder", "more/folder")
    vm.get("more/folder/inside/file", tmp_path / "new/x")
    assert (tmp_path / "new/x").read_text() == "x"
    vm.succeed("(sleep 1; echo hello | nc -l -p 7778) >/dev/null 2>&1 &")
    vm.wait_for_port(7778)
    vm.wait_for_port(7778)
    with pytest.raises(AssertionError, match="nothing listened on port 7779 .*something listens on 22"):
        vm.wait_for_port(7779, timeout_s=1)
    with socket.create_connection(("127.0.0.1", vm.forward(7778)), timeout=20) as there:
        assert there.recv(6) == b"hello\\n"


def test_moments(vm_session, tmp_path):
    vm = vm_session
    ways_in(vm, tmp_path)
    vm.succeed("echo before >state; sync; (while :; do sleep 1; done) >/dev/null 2>&1 & echo $! >pid")
    vm.checkpoint("moment")
    vm.succeed("echo after >state; kill $(cat pid)")
    vm.wait_until_succeeds("! kill -0 $(cat pid)")
    vm.rollback("moment")
    ways_in(vm, tmp_path)
    assert vm.succeed("cat state") == "before\\n"
    vm.succeed("kill -0 $(cat pid)")


def test_its_life(vm_session, tmp_path):
    vm = vm_session
    first = vm.succeed("cat /proc/sys/kernel/random/boot_id")
    vm.succeed("echo kept >state; sync")
    vm.reboot()
    ways_in(vm, tmp_path)
    second = vm.succeed("cat /proc/sys/kernel/random/boot_id")
    with pytest.raises(Exception, match="has rebooted"):
        vm.execute("echo kept >state; sync; reboot -f; sleep 60", user="root")
    ways_in(vm, tmp_path)
    vm.crash()
    vm.start()
    ways_in(vm, tmp_path)
    third = vm.succeed("cat /proc/sys/kernel/random/boot_id")
    assert len({first, second, third}) == 3
    assert vm.succeed("cat state") == "kept\\n"
    assert vm.stop() == "power off in the guest"
"""

FAILING = """
def test_that_fails(vm_factory):
    one = vm_factory(name="one")
    assert one.succeed("uname").strip() == "Linux"
    one.succeed("echo to the log >&2; ls /no/such/place")
"""


@pytest.fixture
def here(project: Project) -> Iterator[Project]:
    project.doit("auto_install").good()
    yield project
    assert not list((project.state / "run").glob("*/machine.toml"))
    assert not project.qemus()


def run(project: Project, text: str, *words: str, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    path = project.root / "test_it.py"
    path.write_text(text)
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(project.root),
        path,
        *words,
    ]
    env = {name: value for name, value in project.env().items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        argv,
        cwd=project.root,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.mark.exhaustive
def test_machines_all_that_a_test_can_do(here: Project) -> None:
    done = run(here, PASSING)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


@pytest.mark.exhaustive
def test_machines_a_failure_shows_console_and_journal(here: Project) -> None:
    done = run(here, FAILING)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"ls /no/such/place\nE +exited with 1, not with a status 0", done.stdout), done.stdout
    assert re.search(r"- console of one -+\n(.*\n)*.*login: ", done.stdout), done.stdout
    journal = done.stdout.partition("journal of one")[2]
    assert re.search(r"\$ uname: status 0 after", journal)
    assert re.search(r"\$ echo to the log .*: status 1 after", journal)


def test_machines_of_a_guest_that_is_not_there(here: Project) -> None:
    done = run(here, "def test_it(vm):\n    pass\n", "--vm-guest", "tiny:nothing")
    assert done.returncode == 1
    assert "no machine could be made: there is no snapshot 'nothing'" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.exhaustive
def test_machines_can_be_kept(here: Project) -> None:
    done = run(here, "def test_it(vm):\n    vm.succeed('true')\n", "--vm-keep")
    assert done.returncode == 0, done.stdout
    line = re.search(r"^kept: (ssh -F \S+ (\S+))$", done.stdout, re.MULTILINE)
    assert line, done.stdout
    assert subprocess.run([*line[1].split(), "true"], timeout=60, check=False, stdin=subprocess.DEVNULL).returncode == 0
    argv = [sys.executable, "-m", "vmtasks.cli", "rm", "--force", line[2]]
    subprocess.run(argv, cwd=here.root, env={**os.environ, **here.env()}, timeout=60, check=True)
    assert not (Path(here.state) / "run" / line[2]).exists()
