"""The command line itself: usage errors are status 2 on stderr, help is there, nothing is done by mistake."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from amount import cases
from forked import run_command_line
from vmtasks import cli
from vmtasks.cli import app
from vmtasks.cli.files import parse_remote
from vmtasks.cli.jobs import describe_end
from vmtasks.cli.login import bind_to_loopback, split_ssh_arguments
from vmtasks.config.rules import first_port
from vmtasks.errors import ConfigError
from vmtasks.guest.jobview import JobView
from vmtasks.images import prune
from vmtasks.images.workspace import MachineRecord, PhaseRecord, Workspace
from vmtasks.machines import MachineSpec, Project
from vmtasks.store.records import ImageRecord, write_record


def bare(home: Path) -> dict[str, str]:
    """An environment with nothing but where programs and this tree are."""
    return {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(cli.__file__).parents[2])}


def vmtasks(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command with nothing of ours in its environment."""
    return run_command_line(*words, cwd=cwd, env={**bare(cwd), "VMTASKS_STORE": str(cwd / "store"), **env})


def every() -> list[list[str]]:
    """All commands, those of groups too."""
    found = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [[name, other] for other in inner] if inner else [[name]]
    return found


@pytest.mark.parametrize("words", every(), ids=" ".join)
def test_k1_every_command_has_help(words: list[str]) -> None:
    done = CliRunner().invoke(app, [*words, "--help"], prog_name="vmtasks")
    assert done.exit_code == 0
    assert f"Usage: vmtasks {' '.join(words)}" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--bogus"], "--bogus"),
        (["run", "--bogus"], "--bogus"),
        (["nosuch"], "nosuch"),
        (["run", "--memory", "4GB"], "--memory '4GB'"),
        (["run", "--disk", "1.5G"], "--disk '1.5G'"),
        (["run", "-p", "70000:80"], "the host's side, 70000"),
        (["run", "--bind", "/nosuch:/x"], "/nosuch"),
        (["run", "--bind", "x"], "no colon"),
        (["run", "--bind", ".:/work", "--bind", "..:/work/"], "--bind '.:/work' and --bind '..:/work': both are"),
        (["run", "--bind", "/:/work/a:ro", "--bind", ".:/work"], "one is inside the other"),
        (["run", "--network", "bridge"], "--network"),
        (["run", "--ssh-port", "80"], "--ssh-port"),
        (["run", "--name", "../x"], "--name"),
        (["run", "--user", "X Y"], "--user"),
        (["run", "--rm"], "--rm"),
        (["run", "--cpus", "0"], "--cpus"),
        (["run", "a:b:c"], "image"),
        (["run", "--ssh-key", "/nosuch.pub"], "/nosuch.pub"),
        pytest.param(
            ["run", "--port", "1:80"],
            "-p 1:80: the host's side, 1, is below ",
            marks=pytest.mark.skipif(first_port() <= 1, reason="this host lets anybody listen on any port"),
        ),
        (
            ["run", "-p", "8080:80", "--port", "8080:81"],
            "-p 8080:80 and -p 8080:81: port 8080 of this host is given twice",
        ),
        (["run", "--ssh-port", "8080", "-p", "8080:80"], "--ssh-port 8080 and -p 8080:80"),
        (["run", "--memory", "99999G"], "--memory 99999G: more than this host's"),
        (["run", "--memory", "1M"], "--memory 1M: too little"),
        (["run", "--cpus", "256"], "--cpus"),
        (["run", "--disk", "99999999T"], "--disk 99999999T: more than a qcow2 image can have; use 2048T or less"),
        (["run", "--disk", "2049T"], "--disk 2049T"),
        (["run", "--name", "x" * 200], "too long, 200 characters; use 63 at most"),
        (["run", "--user", "x" * 33], "too long, 33 characters; use 32 at most"),
        (["run", "x" * 64], "too long, 64 characters"),
        (["run", "--user", ""], "--user '': empty"),
        (["run", "--name", ""], "--name '': empty"),
        (["run", "--memory", ""], "--memory '': empty"),
        (["run", ""], "IMAGE '': empty"),
        (["stop", ""], "NAME '': empty"),
        (["exec", "--user", "", "dev", "true"], "--user '': empty"),
        (["keys", "list", "dev", "--user", ""], "--user '': empty"),
        (["keys", "add", "dev", "/nosuch.pub"], "error: FILE.pub /nosuch.pub: cannot be read"),
        (["rm"], "rm: name machines"),
        (["run", "-d", "--", "ls"], "do not go with -d"),
        (["run", "-d", "-i"], "do not go with -d"),
        (["run", "--json", "--", "ls"], "--json goes with -d"),
        (["run", ":clean"], "image ':clean': nothing before the colon"),
        (["exec", "--bogus", "dev", "true"], "--bogus"),
        (["exec", "-d", "-i", "dev", "true"], "-i, -t and --timeout do not go with -d"),
        (["exec", "--timeout", "0", "dev", "true"], "--timeout 0"),
        (["exec", "--timeout", "nan", "dev", "true"], "--timeout nan"),
        (["-C", "/nosuch", "ps"], "-C /nosuch: No such file"),
        (["stop", "--all", "dev"], "not both"),
        (["ps", "-q", "--json"], "--quiet and --json"),
        (["snapshot", "dev"], "SNAPSHOT"),
        (["snapshot", "rm", "--force", "tiny:"], "nothing after the colon"),
        (["forward", "dev", "-D", "x"], "-D 'x': 'x' is not a port"),
        (["forward", "dev", "-D", "0"], "-D '0'"),
        (["forward", "dev", "-L", "1:h:70000"], "'70000' is not a port"),
        (["forward", "dev", "-L", "1::2"], "the host is missing"),
        (["forward", "x"], "nothing to forward"),
    ],
)
def test_k9_usage_errors_are_status_2(words: list[str], says: str, tmp_path: Path) -> None:
    done = vmtasks(*words, cwd=tmp_path)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert says in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["run", "--", "true"], 125),
        (["exec", "nosuch", "true"], 125),
        (["ssh", "nosuch", "true"], 125),
        (["attach", "nosuch", "0"], 125),
        (["stop", "nosuch"], 1),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_failure_of_our_own_is_no_status_of_the_command(words: list[str], status: int, tmp_path: Path) -> None:
    """Here there is neither an image nor a machine."""
    done = vmtasks(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr[:7]) == (status, "error: ")


@pytest.mark.parametrize("words", every(), ids=" ".join)
def test_usage_lines_have_one_pair_of_brackets(words: list[str]) -> None:
    usage = CliRunner().invoke(app, [*words, "--help"], prog_name="vmtasks").stdout.splitlines()[1]
    assert "[[" not in usage


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


class Here:
    """Machines and snapshots that are on disk only, of nobody's project."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = Workspace(self.project().config())

    def env(self) -> dict[str, str]:
        return {"VM_DIR": str(self.root / "state"), "VMTASKS_STORE": str(self.root / "store")}

    def project(self) -> Project:
        return Project(None, {**bare(self.root), **self.env()})

    def __call__(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return vmtasks(*words, cwd=self.root, **self.env(), **env)

    def machine(self, name: str, snapshot: str = "clean", **more: object) -> None:
        """A machine that was made, and never started."""
        record = MachineRecord(
            name=name, guest="tiny", family="tiny", snapshot=snapshot, image="0" * 64, image_sha256="", ssh_user="dev",
            host_keys=[], **more,
        )  # fmt: skip
        write_record(self.state.machine_folder(name) / "machine.toml", record)

    def snapshot(self, name: str) -> str:
        """A snapshot with an image in the store; returns its digest."""
        store, digest = self.state.store, _digest(name)
        store.partial(digest).parent.mkdir(parents=True, exist_ok=True)
        store.partial(digest).write_bytes(b"disk")
        made = store.publish(
            digest,
            lambda stat, sha256: ImageRecord(
                digest=digest, guest="tiny", version="", name=name, size=stat.st_size, mtime_ns=stat.st_mtime_ns,
                sha256=sha256, virtual_size=4,
            ),
        )  # fmt: skip
        store.snapshot_key(digest).parent.mkdir(parents=True, exist_ok=True)
        store.snapshot_key(digest).write_text("key")
        write_record(self.state.snapshot_record(name), PhaseRecord(digest=digest, sha256=made.sha256))
        prune.register(store, self.state.config.vm_dir)
        return digest


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


def test_of_many_machines_all_are_tried(here: Here) -> None:
    for name in ("a", "b"):
        here.machine(name, own=True)
    done = here("stop", "a", "nosuch", "b", "a")
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if not line.startswith("hint: ")]
    assert said == [
        "machine a is not running",
        "error: nosuch: there is no machine 'nosuch'; there is: a, b",
        "machine b is not running",
    ]
    assert here("stop", "--all").returncode == 0
    done = here("inspect", "b", "nosuch")
    assert done.returncode == 1
    (shown,) = json.loads(done.stdout)
    assert (shown["name"], shown["status"], shown["folder"]) == ("b", "stopped", str(here.state.machine_folder("b")))
    assert here("ps", "-q").stdout == "a\nb\n"
    done = here("rm", "--force", "nosuch", "a")
    assert (done.returncode, "machine a: removed" in done.stderr, here("ps", "-q").stdout) == (1, True, "b\n")


def test_rm_all_leaves_the_projects_own_machine(here: Here) -> None:
    here.machine("mine", own=True)
    here.machine("tiny")
    done = here("rm", "--all", "--force")
    assert done.returncode == 0
    assert here("ps", "-q").stdout == "tiny\n"
    assert here("rm", "--force", "tiny").returncode == 0
    assert here("ps", "-q").stdout == ""


def test_restore_asks_first(here: Here) -> None:
    here.machine("a", own=True)
    done = here("restore", "a", "one")
    assert done.returncode == 1
    assert "nothing was changed: there is no terminal to ask on\nhint: vmtasks restore --yes" in done.stderr
    assert "there is no snapshot 'one' of tiny" in here("restore", "--yes", "a", "one").stderr


def test_snapshots_are_removed_with_what_they_hold(here: Here) -> None:
    gone, used = here.snapshot("one"), here.snapshot("two")
    here.machine("a", snapshot="two", own=True)
    assert "there is no terminal to ask on" in here("snapshot", "rm", "tiny:one").stderr
    assert here.state.store.made(gone)
    done = here("snapshot", "rm", "--force", "tiny:two", "tiny:nosuch", "tiny:one")
    assert done.returncode == 1
    assert "snapshot tiny:two: in use by a; nothing was removed" in done.stderr
    assert "error: tiny:nosuch: there is no snapshot 'nosuch' of tiny; there is: one, two" in done.stderr
    assert "snapshot tiny:one: removed\n" in done.stderr
    left = [path.name for path in here.state.store.root.rglob("*") if gone in path.name and path.parent.name != "locks"]
    assert left == []
    assert here.state.store.made(used)
    assert "is the image that the phases end in" in here("snapshot", "rm", "--force", "tiny:clean").stderr


def test_an_image_that_another_project_names_stays(here: Here, tmp_path: Path) -> None:
    digest = here.snapshot("one")
    other = tmp_path / "other"
    (made,) = here.state.store.made(digest)
    write_record(other / "tiny" / "snapshots" / "copy.toml", PhaseRecord(digest=digest, sha256=made.sha256))
    prune.register(here.state.store, other)
    assert "its image stays until vmtasks prune" in here("snapshot", "rm", "--force", "tiny:one").stderr
    assert here.state.store.made(digest)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("vmtasks stop d", "dev\ndoc"),
        ("vmtasks -C elsewhere stop d", "dev\ndoc"),
        ("vmtasks run tiny:", "tiny:one\ntiny:two"),
        ("vmtasks snapshot rm tiny:t", "tiny:two"),
        ("vmtasks snapshots t", "tiny"),
        ("vmtasks restore dev ", "one\ntwo"),
        ("vmtasks attach dev 0", ""),
    ],
)
def test_names_complete(words: str, found: str, here: Here) -> None:
    (here.root / "elsewhere").mkdir()
    for name in ("dev", "doc", "box"):
        here.machine(name, own=True)
    here.snapshot("one")
    here.snapshot("two")
    given = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_VMTASKS_COMPLETE": "complete_bash"}
    done = here(**given)
    assert (done.stdout.strip(), done.stderr) == (found, "")


def test_the_programs_that_are_run_can_be_seen(here: Here) -> None:
    assert re.search(r"(?m)^\+ run \S*qemu-system", here("-v", "doctor").stderr), "to try the accelerator, once"
    assert here("doctor").stderr == ""


def test_any_free_port_may_be_asked_for_twice(tmp_path: Path) -> None:
    done = vmtasks("run", "-p", "0:80", "-p", "0:80", cwd=tmp_path)
    assert "does not have tiny as shipped with vmtasks" in done.stderr, "it comes after all that is checked"


@pytest.mark.parametrize("closed", cases("<&- >&- 2>&-", more=["<&-", ">&-", "2>&-"]))
@pytest.mark.parametrize(("words", "status"), [(["ps"], 0), (["ps", "--json"], 0), (["rm", "nosuch"], 1)])
def test_a_closed_standard_stream_is_dev_null(words: list[str], status: int, closed: str, tmp_path: Path) -> None:
    entry = [sys.executable, "-c", "from vmtasks.cli import main; main()", *words]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *entry],
        cwd=tmp_path, env=bare(tmp_path), capture_output=True, check=False,
        stdin=subprocess.DEVNULL, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == (status == 0 and " >&-" not in f" {closed}")
    assert bool(done.stderr) == (status != 0 and "2>&-" not in closed)


def test_a_verb_loads_its_own_module_and_help_loads_all() -> None:
    code = (
        "import sys; from vmtasks import cli; cli.load(sys.argv[1:]);"
        "print(*sorted(name for name in cli.MODULES if f'vmtasks.cli.{name}' in sys.modules))"
    )
    everything = sorted(cli.MODULES)
    for words, loaded in {
        ("cp", "a", "b:c"): ["files"],
        ("-v", "-C", "ps", "prune"): ["project"],
        ("-Cps", "prune", "ps"): ["project"],
        ("--help", "ps"): everything,
        ("no-such-verb",): everything,
        (): everything,
    }.items():
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=True, text=True)
        assert done.stdout.split() == loaded, words


def test_every_verb_is_in_the_table_of_modules() -> None:
    """And only there where it is."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    found: dict[str, list[str]] = {}
    for name, command in group.commands.items():
        callback = command.callback or next(iter(command.commands.values())).callback  # type: ignore[attr-defined]
        found.setdefault(callback.__module__.rpartition(".")[2], []).append(name)
    assert {module: sorted(verbs) for module, verbs in found.items()} == cli.MODULES


def test_descriptors_of_closed_streams_are_taken(tmp_path: Path) -> None:
    """So that no file that is opened later gets one of their numbers; children inherit them."""
    code = (
        "import os, subprocess, sys; from vmtasks.host import progress; progress.open_streams();"
        "handle = os.open('.', os.O_RDONLY); names = [os.readlink(f'/proc/self/fd/{n}') for n in range(3)];"
        "child = subprocess.run(['readlink', '/proc/self/fd/0'], stdout=subprocess.PIPE, text=True).stdout.strip();"
        "open('found', 'w').write(' '.join([str(handle > 2), *names, child]))"
    )
    subprocess.run(
        ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code],
        cwd=tmp_path,
        env=bare(tmp_path),
        check=True,
        timeout=60,
    )
    assert (tmp_path / "found").read_text() == "True /dev/null /dev/null /dev/null /dev/null"


def test_k14_errors_are_plain_text_on_stderr(tmp_path: Path) -> None:
    done = vmtasks("ssh", "nosuch", cwd=tmp_path)
    assert done.returncode == 125
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no machine 'nosuch'")
    assert "\x1b" not in done.stderr


def test_k10_a_store_without_an_image_names_the_next_step(tmp_path: Path) -> None:
    done = vmtasks("run", cwd=tmp_path)
    assert done.returncode == 125
    assert "does not have tiny as shipped with vmtasks" in done.stderr
    assert "doit auto_install" in done.stderr
    assert not list(tmp_path.rglob("machine.toml"))


def test_k24_no_byte_of_a_private_key_goes_anywhere(tmp_path: Path) -> None:
    secret = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmU"  # noqa: S105 - nobody's
    key = tmp_path / "id"
    key.write_text(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{secret}\n-----END OPENSSH PRIVATE KEY-----\n")
    done = vmtasks("run", "--ssh-key", str(key), cwd=tmp_path)
    assert done.returncode == 2
    assert "this is a private key" in done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != key]
    assert not [path for path in written if secret.encode() in path.read_bytes()]
    assert secret not in done.stderr


@pytest.mark.parametrize(
    ("given", "options", "command"),
    [
        ([], [], []),
        (["uname", "-a"], [], ["uname", "-a"]),
        (["--", "-v", "uname", "-a"], ["-v"], ["uname", "-a"]),
        (["-vv", "-L", "1:h:2", "-p22", "x"], ["-vv", "-L", "1:h:2", "-p22"], ["x"]),
        (["-tv", "-o", "A=b", "--", "-x"], ["-tv", "-o", "A=b"], ["-x"]),
        (["--", "--", "-x"], [], ["-x"]),
        (["-fNL", "1:h:2"], ["-fNL", "1:h:2"], []),
        (["-"], [], ["-"]),
    ],
)
def test_what_is_for_ssh_and_what_for_the_guest(given: list[str], options: list[str], command: list[str]) -> None:
    assert split_ssh_arguments(given) == (options, command)


@pytest.mark.parametrize(
    ("kind", "text", "line"),
    [
        ("-R", "0:h:2", "127.0.0.1:0:h:2"),
        ("-L", "1:h:2", "127.0.0.1:1:h:2"),
        ("-R", "localhost:1:h:2", "localhost:1:h:2"),
        ("-D", "9", "127.0.0.1:9"),
    ],
)
def test_listeners_are_on_loopback(kind: str, text: str, line: str) -> None:
    assert bind_to_loopback(kind, text) == line


@pytest.mark.parametrize(("kind", "text"), [("-L", "0.0.0.0:1:h:2"), ("-L", "*:1:h:2"), ("-D", "::1:9"), ("-L", "1")])
def test_other_listeners_are_refused(kind: str, text: str) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1"):
        bind_to_loopback(kind, text)


@pytest.mark.parametrize(
    ("text", "side"),
    [("a:x", ("a", "x")), ("a:", ("a", "")), ("./a:x", None), ("/x/a:b", None), ("plain", None), ("b:x", ("b", "x"))],
)
def test_sides_of_cp(text: str, side: tuple[str, str] | None) -> None:
    assert parse_remote(text, ["a"]) == side


def test_the_option_is_named_also_from_python(tmp_path: Path) -> None:
    project = Project(None, {"VM_DIR": str(tmp_path / "state"), "VMTASKS_STORE": str(tmp_path / "store")})
    with pytest.raises(ConfigError, match="--cpus 1000: QEMU gives a machine 1 to 255"):
        project.create(MachineSpec(cpus=1000))


@pytest.mark.parametrize(
    ("view", "says"),
    [
        (JobView("x", "make", "ended", status=7), "ended, status 7"),
        (JobView("x", "make", "ended", status=137, signal="KILL"), "ended by signal KILL, status 137"),
        (JobView("x", "make", "rebooted"), "ended by a reboot of the guest; its exit status is not known"),
        (
            JobView("x", "make", "lost"),
            "ended, because its supervisor in the guest was killed; its exit status is not known",
        ),
        (JobView("x", "make", "running"), "still running"),
    ],
)
def test_what_is_known_of_the_end_of_a_job(view: JobView, says: str) -> None:
    assert describe_end(view) == says
