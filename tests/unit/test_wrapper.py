"""The wrapper ./doit, with only what a test puts there in PATH: stubs stand for package managers, sudo and uv."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BASE = ["cat", "cmp", "cp", "env", "find", "ln", "mkdir", "mv", "readlink", "rm", "rmdir", "sh", "sleep", "tail"]
PROGRAMS = ["qemu-img", "qemu-system-x86_64", "rsync", "ssh", "ssh-keygen"]
STUBS = {
    "apt-get": 'case $* in *install*) for tool in $BRINGS; do cp "$BIN/true" "$BIN/$tool"; done ;; esac',
    "brew": "",
    "dnf": "",
    "id": "echo ${FAKE_UID:-0}",
    "pacman": "",
    "sudo": '[ -z "$SUDO_REFUSES" ] || exit 1; [ "$1" != -n ] || shift; [ "$1" = true ] || exec "$@"',
    "true": "",
    "uv": '[ "$1" != venv ] || { mkdir -p .venv/bin; cp "$BIN/doit" .venv/bin; cp "$BIN/vpython" .venv/bin/python; }',
    "doit": 'printf "<%s>" "$PWD" "$@"; exit 7',
    "zypper": "",
}
PYTHON = """#!/bin/sh
[ "$1 $2" != "-m doit" ] || { shift 2; exec "$BIN/doit" "$@"; }
"""


class Place:
    """A copy of the wrapper in a folder with an awkward name, and a PATH of its own."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "it's a place"
        self.bin = tmp_path / "bin"
        self.log = tmp_path / "calls"
        self.root.mkdir()
        self.bin.mkdir()
        shutil.copy(ROOT / "doit", self.root)
        (self.root / "requirements.lock").write_text("one==1\n")
        for tool in BASE:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        (self.bin / "python3").symlink_to(sys.executable)
        self.stub("doit", "id", "sudo", "true", "uv", *PROGRAMS)
        (self.bin / "vpython").write_text(PYTHON)
        (self.bin / "vpython").chmod(0o755)

    def stub(self, *names: str) -> None:
        """Put programs into PATH that record how they are called."""
        for name in names:
            body = f'printf "%s\\n" "{name} $*" >>"$CALLS"\n{STUBS.get(name, "")}\n'
            (self.bin / name).write_text("#!/bin/sh\n" + body)
            (self.bin / name).chmod(0o755)

    def lacks(self, *names: str) -> None:
        for name in names:
            (self.bin / name).unlink()

    def run(self, *words: str, program: str = "", cwd: str = "/", **env: str) -> subprocess.CompletedProcess[str]:
        known = {"PATH": str(self.bin), "BIN": str(self.bin), "CALLS": str(self.log), "SUDO_REFUSES": ""}
        argv = [program or str(self.root / "doit"), *words]
        return subprocess.run(
            argv,
            cwd=cwd,
            env=known | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def calls(self, program: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith(f"{program} ")]

    def prepare(self) -> None:
        """Make the .venv that a first run would have made."""
        assert self.run().returncode == 7
        self.log.unlink()


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_the_first_run_makes_the_venv_and_goes_on(place):
    done = place.run("list", "two words", "", "it's")
    assert done.returncode == 7
    assert done.stdout == f"<{place.root}><list><two words><><it's>"
    venv, lock, project = (call for call in place.calls("uv") if call != "uv --version")
    assert venv.startswith("uv venv ")
    assert "--require-hashes" in lock
    assert "--no-deps" in project
    assert done.stderr.count("\n") == 2


def test_later_runs_start_nothing_but_doit(place):
    place.prepare()
    assert place.run("list").stdout == f"<{place.root}><list>"
    assert place.log.read_text() == "doit list\n"


@pytest.mark.exhaustive
def test_a_folder_with_a_quotation_mark_in_its_name(place: Place, tmp_path: Path) -> None:
    """Real pip, whose scripts there begin with lines that no shell can read."""
    root = tmp_path / 'a "quoted" folder'
    place.root.rename(root)
    wheel = tmp_path / "doit-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("doit/__init__.py", "import sys\ndef main():\n    print('doit', *sys.argv[1:])\n")
        made.writestr("doit/__main__.py", "from doit import main\nmain()\n")
        made.writestr("doit-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: doit\nVersion: 1\n")
        made.writestr("doit-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr("doit-1.dist-info/entry_points.txt", "[console_scripts]\ndoit = doit:main\n")
        made.writestr("doit-1.dist-info/RECORD", "")
    subprocess.run([sys.executable, "-m", "venv", root / ".venv"], check=True)
    pip = [root / ".venv/bin/python", "-m", "pip", "install", "--quiet", "--no-index", wheel]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    shutil.copy(root / "requirements.lock", root / ".venv/.vmtasks-lock")
    (root / ".venv/.vmtasks-root").write_text(f"{root}\n")
    done = place.run("list", "a b", program=str(root / "doit"))
    assert (done.returncode, done.stdout) == (0, "doit list a b\n"), done.stderr


@pytest.mark.parametrize("how", ["link beside", "link to link", "sh", "relative"])
def test_works_from_anywhere(place, how, tmp_path):
    place.prepare()
    (place.root / "beside").symlink_to("doit")
    (tmp_path / "first").symlink_to("it's a place/beside")
    (tmp_path / "second").symlink_to(tmp_path / "first")
    sh = str(place.bin / "sh")
    done = {
        "link beside": lambda: place.run("x", program=str(place.root / "beside")),
        "link to link": lambda: place.run("x", program="./second", cwd=str(tmp_path), CDPATH="/usr"),
        "sh": lambda: place.run("doit", "x", program=sh, cwd=str(place.root)),
        "relative": lambda: place.run("x", program="it's a place/doit", cwd=str(tmp_path), CDPATH="/usr"),
    }[how]()
    assert done.stdout == f"<{place.root}><x>"
    assert done.returncode == 7


@pytest.mark.parametrize("change", ["lock file", "stamp", "moved", "python"])
def test_a_venv_that_does_not_fit_is_made_anew(place, change, tmp_path):
    place.prepare()
    (place.root / ".venv" / "lib").mkdir()
    if change == "lock file":
        (place.root / "requirements.lock").write_text("one==2\n")
    elif change == "stamp":
        (place.root / ".venv" / ".vmtasks-lock").unlink()
    elif change == "python":
        (place.root / ".venv" / "bin" / "python").unlink()
    else:
        place.root = place.root.rename(tmp_path / "elsewhere")
    assert place.run("x").stdout == f"<{place.root}><x>"
    assert len([call for call in place.calls("uv") if call.startswith("uv venv")]) == 1
    assert not (place.root / ".venv" / "lib").exists()
    stamp = (place.root / ".venv" / ".vmtasks-lock").read_text()
    assert stamp == (place.root / "requirements.lock").read_text()


def test_a_failure_shows_the_log_and_leaves_no_stamp(place):
    (place.bin / "uv").write_text('#!/bin/sh\n[ "$1" != pip ] || { echo "no such thing"; exit 1; }\n')
    done = place.run()
    assert done.returncode == 1
    assert "no such thing" in done.stderr
    assert not (place.root / ".venv" / ".vmtasks-lock").exists()
    assert not (place.root / ".venv" / ".setup-lock").is_symlink()


COMMANDS = {
    "apt-get": "apt-get install -y --no-install-recommends qemu-system-x86 qemu-utils rsync openssh-client",
    "brew": "brew install qemu rsync openssh",
    "dnf": "dnf install -y --setopt=install_weak_deps=False"
    " qemu-system-x86-core qemu-img rsync openssh-clients openssh",
    "pacman": "pacman -S --needed --noconfirm qemu-system-x86 qemu-img rsync openssh",
    "zypper": "zypper --non-interactive install --no-recommends"
    " qemu-x86 qemu-tools rsync openssh-clients openssh-common",
}


@pytest.mark.parametrize("manager", sorted(COMMANDS))
def test_without_permission_it_prints_the_command_and_ends_with_2(place, manager):
    place.lacks(*PROGRAMS)
    place.stub(manager)
    done = place.run(VMTASKS_NO_INSTALL="1")
    assert done.returncode == 2
    assert f"\n  {COMMANDS[manager]}\n" in done.stderr
    assert "qemu-system-x86_64   runs the guests" in done.stderr
    assert place.calls(manager) == []


def test_without_root_and_without_a_password_it_prints_the_command_with_sudo(place):
    place.lacks("rsync")
    place.stub("apt-get")
    done = place.run(FAKE_UID="1000", SUDO_REFUSES="1")
    assert done.returncode == 2
    assert "\n  sudo apt-get install -y --no-install-recommends rsync\n" in done.stderr
    assert place.calls("sudo") == ["sudo -n true"]


def test_without_root_and_without_sudo_it_prints_the_command(place):
    place.lacks("rsync", "sudo")
    place.stub("apt-get")
    done = place.run(FAKE_UID="1000")
    assert done.returncode == 2
    assert "\n  apt-get install -y --no-install-recommends rsync\n" in done.stderr


@pytest.mark.parametrize(("uid", "sudo"), [("0", []), ("1000", ["sudo -n true", "sudo -n env DEBIAN_FRONTEND"])])
def test_with_permission_it_says_what_is_missing_and_installs_it(place, uid, sudo):
    place.lacks("rsync", "qemu-img")
    place.stub("apt-get")
    done = place.run(FAKE_UID=uid, BRINGS="rsync qemu-img")
    assert done.returncode == 7
    assert place.calls("apt-get")[-1] == "apt-get install -y --no-install-recommends qemu-utils rsync"
    assert [call.split("=")[0] for call in place.calls("sudo") if "update" not in call] == sudo
    assert done.stderr.index("copies the source tree") < done.stderr.index("installing with apt-get")


def test_packages_that_do_not_bring_the_program_are_a_failure(place):
    place.lacks("rsync")
    place.stub("apt-get")
    done = place.run(BRINGS="")
    assert done.returncode == 1
    assert "still missing" in done.stderr


def test_an_unknown_system_is_told_what_to_install(place):
    place.lacks("rsync")
    done = place.run()
    assert done.returncode == 2
    assert "rsync" in done.stderr


def test_the_lock_of_a_dead_process_is_taken_over(place):
    (place.root / ".venv").mkdir()
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    (place.root / ".venv" / ".setup-lock").symlink_to(str(dead.pid))
    assert place.run().returncode == 7
    assert not (place.root / ".venv" / ".setup-lock").is_symlink()


def test_the_lock_of_a_living_process_is_waited_for(place):
    place.prepare()
    stamp = place.root / ".venv" / ".vmtasks-lock"
    held = stamp.rename(stamp.with_name("held"))
    lock = place.root / ".venv" / ".setup-lock"
    lock.symlink_to(str(os.getpid()))
    env = {"PATH": str(place.bin), "BIN": str(place.bin), "CALLS": str(place.log)}
    with subprocess.Popen(
        [place.root / "doit"], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        assert f"waiting for process {os.getpid()}" in run.stderr.readline()
        held.rename(stamp)
        lock.unlink()
        assert run.wait(20) == 7
    assert place.calls("uv") == []


def test_the_wrapper_costs_little(place):
    place.prepare()
    place.stub("doit")
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        place.run()
        took.append(time.perf_counter() - begun)
    assert min(took) < 0.1


def test_the_lock_file_holds_every_dependency_and_no_address():
    text = (ROOT / "requirements.lock").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
    names = [re.match(r"[\w.-]+", line).group().lower().replace(".", "-").replace("_", "-") for line in wanted]
    pinned = dict(re.findall(r"(?m)^([a-z0-9-]+)==(\S+)", text))
    assert [name for name in [*names, "hatchling"] if name not in pinned] == []
    assert "://" not in text
    assert text.count("--hash=sha256:") > len(pinned)
