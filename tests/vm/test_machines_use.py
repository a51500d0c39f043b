"""One machine of `vmtasks run -d`, used in every way: commands, files, forwards, keys, console, sessions."""

import json
import os
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from machines import COMMAND, Cli, digest, get, here, login, make_key, open_port, socks
from terminal import terminal

from amount import cases
from conftest import Project, free_port, listeners, until

pytestmark = pytest.mark.timeout(600)

STATUSES = (0, 1, 42, 126, 127, 255)
ODD = ["a b", "$HOME", "`id`", "it's", '"', "\\", "*", "-x", "--", "ü", "a\nb", "!", "%s", ";", ""]
RSYNC_E = "ssh -F {}"


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Cli]:
    """A project with one machine, `box`: a forward, two people's keys, 300 MiB, two CPUs."""
    root = tmp_path_factory.mktemp("use")
    made = Cli(Project(root / "project", store))
    alice, bob = make_key(root / "alice"), make_key(root / "bob", "ecdsa")
    made.make(
        "box", "--memory", "300", "--cpus", "2", "-p", "0:8080", "--ssh-key", str(alice), "--ssh-key", str(bob),
    )  # fmt: skip
    yield made
    made.good("rm", "--force", "box")
    made.nothing_left()


@pytest.fixture
def root(cli: Cli) -> Path:
    return cli.project.root.parent


# -- commands


@pytest.mark.parametrize("verb", cases("exec", more=["ssh"]))
def test_b18_b39_exit_statuses_and_streams_come_back(cli: Cli, verb: str) -> None:
    for status in STATUSES:
        words = [f"exit {status}"] if verb == "ssh" else ["sh", "-c", f"exit {status}"]
        assert cli(verb, "box", *words).returncode == status
    killed = ["kill -KILL $$"] if verb == "ssh" else ["sh", "-c", "kill -KILL $$"]
    assert cli(verb, "box", *killed).returncode == 137
    text = "echo a; echo b >&2; printf '\\001\\377'"
    done = cli(verb, "box", *([text] if verb == "ssh" else ["sh", "-c", text]))
    assert done.stdout == b"a\n\x01\xff"
    assert done.stderr == b"b\n"
    asked = ["exec", "-i"] if verb == "exec" else ["ssh"]
    assert cli(*asked, "box", "cat", stdin=bytes(range(256))).stdout == bytes(range(256))


@pytest.mark.exhaustive
def test_a_loop_keeps_its_list(cli: Cli, tmp_path: Path) -> None:
    """Standard input is for the command only with -i, as podman has it."""
    (tmp_path / "list").write_text("box\nbox\n")
    loop = f'while read -r name; do {shlex.join(COMMAND)} exec "$name" cat; echo "did $name"; done <{tmp_path}/list'
    done = subprocess.run(
        ["sh", "-c", loop], cwd=cli.project.root, env=cli.env(), capture_output=True, check=False, timeout=60
    )
    assert (done.stdout, done.stderr) == (b"did box\ndid box\n", b"")


@pytest.mark.exhaustive
def test_a_terminal_is_there_only_where_it_was_asked_for(cli: Cli) -> None:
    assert cli("exec", "box", "tty").stdout == b"not a tty\n"
    assert cli("exec", "-t", "box", "tty").stdout.startswith(b"/dev/pts/")
    script = "stty -echo; echo ready; read -r word; echo got $word; tty"
    with terminal([*COMMAND, "exec", "-it", "box", "sh", "-c", script], cli.project.root, cli.env()) as ours:
        ours.wait_for("ready")
        ours.type("typed\r")
        ended = ours.end()
    assert "got typed\n/dev/pts/" in ended.good()


def test_what_cannot_be_run_has_statuses_of_its_own(cli: Cli) -> None:
    assert cli("exec", "box", "/etc/passwd").returncode == 126
    assert cli("exec", "box", "no-such-program").returncode == 127


@pytest.mark.exhaustive
def test_a_command_that_takes_too_long_is_ended(cli: Cli) -> None:
    done = cli("exec", "--timeout", "4", "box", "sh", "-c", "echo a; sleep 4323")
    assert (done.returncode, done.stdout) == (124, b"a\n")
    assert done.stderr == b"error: the command did not end within 4 s; it was ended\n"
    assert cli("exec", "box", "pgrep", "-f", "sleep 432[3]").stdout == b""


@pytest.mark.parametrize("verb", ["ssh", "exec"])
def test_b18_words_arrive_as_they_are(cli: Cli, verb: str) -> None:
    done = cli(verb, "box", "printf", "%s\\0", *ODD)
    assert done.stdout.decode().split("\0")[:-1] == ODD


def test_b18_a_line_is_for_the_remote_shell(cli: Cli) -> None:
    assert (
        cli.good("ssh", "box", "printf '%s\\n' b a | sort && echo $((1+1)); cd /etc; ls pass*d") == "a\nb\n2\npasswd\n"
    )


def test_exec_sets_user_folder_and_environment(cli: Cli) -> None:
    words = ["--user", "root", "--cwd", "/etc", "-e", "X=it's $1", "box", "sh", "-c", 'id -un; pwd; echo "$X"']
    assert cli.good("exec", *words) == "root\n/etc\nit's $1\n"


@pytest.mark.exhaustive
def test_another_user_is_another_connection(cli: Cli) -> None:
    assert [cli.good("ssh", "box", *words, "id -un").strip() for words in ([], ["--", "-l", "root"], [])] == [
        "dev", "root", "dev",
    ]  # fmt: skip


@pytest.mark.exhaustive
def test_b32_a_user_that_is_refused_is_an_authentication_failure(cli: Cli) -> None:
    done = cli("ssh", "box", "--", "-l", "nobody", "-o", "ControlPath=none", "true")
    assert done.returncode == 255
    assert b"Permission denied" in done.stderr


def test_b35_options_reach_ssh(cli: Cli) -> None:
    assert b"debug1: " in cli("ssh", "box", "--", "-v", "true").stderr


def test_k19_the_printed_line_runs_as_it_is(cli: Cli) -> None:
    line = cli.good("ssh", "--print", "box")
    assert line.count("\n") == 1
    known = Path.home() / ".ssh" / "known_hosts"
    before = known.read_bytes() if known.exists() else b""
    done = subprocess.run(["sh", "-c", f"{line.strip()} true"], check=False, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (known.read_bytes() if known.exists() else b"") == before


@pytest.mark.exhaustive
def test_b11_eight_sessions_at_once(cli: Cli) -> None:
    wait = "until [ -e go ]; do sleep 1; done"
    many = [cli.start("ssh", "box", f"{wait}; echo {number}") for number in range(8)]
    until(lambda: len(cli.machine("box")["sessions"]) == 8, 90, "eight sessions in ps")
    cli.good("ssh", "box", "touch go")
    said = [(*one.communicate(timeout=120), one.returncode) for one in many]
    assert said == [(f"{number}\n".encode(), b"", 0) for number in range(8)]
    assert cli.machine("box")["sessions"] == []


@pytest.mark.exhaustive
def test_b11_sessions_that_begin_while_others_end(cli: Cli) -> None:
    """Some servers close a session that begins at such a moment (dropbear 2022.83 a third of these)."""
    config = str(cli.machine("box")["ssh_config"])

    def run(number: int) -> tuple[bytes, bytes, int]:
        words = ["ssh", "-F", config, "box", f"sleep 0.0{number % 9}; echo {number}"]
        done = subprocess.run(words, capture_output=True, check=False, stdin=subprocess.DEVNULL, timeout=60)
        return done.stdout, done.stderr, done.returncode

    cli.good("ssh", "box", "true")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(80))) == [(f"{number}\n".encode(), b"", 0) for number in range(80)]


@pytest.mark.exhaustive
def test_b11_the_first_sessions_of_a_machine_log_in_once(cli: Cli) -> None:
    """None says that another has made the connection; see run_attached() in guest/ssh.py."""
    subprocess.run(["ssh", "-F", str(cli.machine("box")["ssh_config"]), "-O", "exit", "box"], check=True, timeout=30)
    many = [cli.start("exec", "box", "sh", "-c", "echo $PPID") for _ in range(8)]
    said = [(*one.communicate(timeout=120), one.returncode) for one in many]
    assert [(err, status) for _, err, status in said] == [(b"", 0)] * 8
    assert len({out for out, _, _ in said}) == 8


@pytest.mark.exhaustive
def test_b37_connections_are_shared(cli: Cli) -> None:
    """Without the client's own start, which takes as long with both."""
    config = str(cli.machine("box")["ssh_config"])

    def took_s(*options: str) -> float:
        began = time.monotonic()
        words = ["ssh", "-F", config, *options, "box", "true"]
        subprocess.run(words, check=True, timeout=60, stdin=subprocess.DEVNULL, capture_output=True)
        return time.monotonic() - began

    cli.good("ssh", "box", "true")
    start = min(took_s("-G") for _ in range(9))
    shared = min(took_s() for _ in range(9))
    alone = min(took_s("-o", "ControlPath=none") for _ in range(9))
    assert shared - start < (alone - start) / 3


def test_b30_b43_who_used_it_is_on_record(cli: Cli) -> None:
    cli("ssh", "box", "exit 3")
    entry = json.loads((cli.project.state / "access.log").read_text().splitlines()[-1])
    assert (entry["machine"], entry["user"], entry["verb"], entry["command"], entry["status"]) == (
        "box", "dev", "ssh", "exit 3", 3,
    )  # fmt: skip


def test_b40_a_machine_that_fails_does_not_stop_the_others(cli: Cli) -> None:
    loop = " && ".join(
        ["s=0"] + [f"{{ {shlex.join(COMMAND)} exec {name} echo {name} || s=1; true; }}" for name in ("x", "box")]
    )
    done = subprocess.run(
        ["sh", "-c", f"{loop}; exit $s"], cwd=cli.project.root, env=cli.env(), capture_output=True, check=False
    )
    assert done.stdout == b"box\n"
    assert done.returncode == 1


# -- interrupts

LOOP = 'for n in 1 2 3; do "$@"; done; echo after'


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["exec", "box", "sh", "-c", "echo works; sleep 4321; echo on"], id="exec"),
        pytest.param(
            ["exec", "--user", "root", "box", "sh", "-c", "echo works; sleep 4321; echo on"],
            id="exec as root",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(["ssh", "box", "echo works; sleep 4321; echo on"], id="ssh", marks=pytest.mark.exhaustive),
    ],
)
def test_ctrl_c_ends_the_loop_here_and_the_command_in_the_guest(cli: Cli, words: list[str]) -> None:
    with terminal(["bash", "-c", LOOP, "bash", *COMMAND, *words], cli.project.root, cli.env()) as ours:
        ours.wait_for("works")
        ours.type("\x03")
        ended = ours.end()
    assert ended.status in (-signal.SIGINT, 128 + signal.SIGINT)
    assert ended.output.count("works") == 1, ended.output
    assert "after" not in ended.output
    assert "warning" not in ended.output, ended.output
    assert cli("exec", "box", "pgrep", "-f", "sleep 432[1]").stdout == b""


@pytest.mark.exhaustive
def test_output_that_nobody_reads_ends_the_command_in_the_guest(cli: Cli) -> None:
    line = f"{shlex.join([*COMMAND, 'exec', 'box', 'sh', '-c', 'while echo y; do :; done; sleep 4322'])} | head -1"
    done = subprocess.run(
        ["sh", "-c", line], cwd=cli.project.root, env=cli.env(), capture_output=True, check=False, timeout=120
    )
    assert done.stdout == b"y\n"
    assert cli("exec", "box", "pgrep", "-f", "sleep 432[2]").stdout == b""


# -- jobs


@pytest.mark.exhaustive
def test_jobs_outlive_their_command(cli: Cli) -> None:
    job = cli.good("exec", "--detach", "box", "sh", "-c", "for n in 1 2 3 4; do echo $n; sleep 1; done; exit 7").strip()
    first = cli("attach", "box", job[:6])
    assert (first.returncode, first.stdout) == (7, b"1\n2\n3\n4\n"), first.stderr
    assert cli("attach", "box", job).stdout == first.stdout
    long = cli.good("exec", "-d", "box", "sleep", "300").strip()
    states = {item["job"]: (item["state"], item["status"]) for item in cli.json("jobs", "box")}  # type: ignore[attr-defined]
    assert states == {job: ("ended", 7), long: ("running", None)}
    assert b"ended by signal TERM, status 143" in cli("cancel", "box", long).stderr
    assert cli("attach", "box", long).returncode == 128 + 15
    assert f"job {job}: ended, status 7" in cli("cancel", "box", job).stderr.decode()
    assert "no job of box begins with 'nosuch'" in cli.bad("attach", "box", "nosuch")
    cli.good("jobs", "box", "--clear")
    assert cli.json("jobs", "box") == []


# -- what it is


@pytest.mark.exhaustive
def test_b17_k31_memory_cpus_and_ports(cli: Cli) -> None:
    assert 0.8 * 300 * 1024 < int(cli.good("exec", "box", "awk", "/MemTotal/{print $2}", "/proc/meminfo")) < 300 * 1024
    assert cli.good("exec", "box", "nproc") == "2\n"
    shown = cli.machine("box")
    assert (shown["memory"], shown["cpus"], shown["status"], shown["image"]) == (300 << 20, 2, "running", "tiny:clean")
    assert shown["ports"] == cli.json("port", "box")
    cli.good("ssh", "box", "mkdir -p www; echo served >www/index.html; busybox httpd -p 8080 -h www")
    host = next(port["host"] for port in shown["ports"] if port["guest"] == 8080)  # type: ignore[attr-defined]
    assert get(host) == "served\n"


def test_b29_its_disk_cannot_outgrow_its_size(cli: Cli) -> None:
    words = ["qemu-img", "info", "-U", "--output=json", cli.run_folder / "box" / "disk.qcow2"]
    assert json.loads(subprocess.check_output(words))["virtual-size"] == 1 << 30


def test_b33_what_it_costs_is_shown(cli: Cli) -> None:
    shown = cli.machine("box")
    assert float(str(shown["cpu_s"])) > 1
    assert (
        32 << 20 < int(str(shown["rss"])) < (300 << 20) + (1536 << 20)
    )  # emulation keeps a gigabyte of translated code


def test_k15_state_files_are_where_scripts_expect_them(cli: Cli) -> None:
    folder = cli.run_folder / "box"
    shown = cli.machine("box")
    assert int((folder / "box.pid").read_text()) == shown["pid"]
    assert b"qemu-system" in Path(f"/proc/{shown['pid']}/cmdline").read_bytes()
    ports = dict(line.split(",") for line in (folder / "box.ports").read_text().splitlines())
    assert ports["ssh"] == str(shown["ports"][0]["host"])  # type: ignore[index]
    assert (folder / "box-monitor.socket").is_socket()
    assert (folder / "box-serial.socket").is_socket()
    assert "Linux version" in cli.good("logs", "box") or "login:" in cli.good("logs", "box")


def test_k25_b14_nothing_listens_beyond_loopback(cli: Cli) -> None:
    assert listeners([int(str(cli.machine("box")["pid"]))]) == {"0100007F"}


def test_k26_b14_qemu_is_unprivileged_also_for_root(cli: Cli) -> None:
    status = Path(f"/proc/{cli.machine('box')['pid']}/status").read_text()
    facts = dict(line.split(":\t", 1) for line in status.splitlines())
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if name != "CapBnd" or os.getuid() == 0:
            assert int(facts[name], 16) == 0, name
    assert facts["NoNewPrivs"] == "1"
    assert facts["Seccomp"] == "2"


def test_k26_no_folder_of_this_host_is_shared_unasked(cli: Cli) -> None:
    words = Path(f"/proc/{cli.machine('box')['pid']}/cmdline").read_bytes().decode().split("\0")
    assert not [word for word in words if "smb=" in word or str(Path.home()) + "," in word]
    assert "-fsdev" not in words


def test_k8_unknown_and_stopped_are_told_apart_and_soon(cli: Cli) -> None:
    began = time.monotonic()
    said = cli.bad("ssh", "nosuch", "true")
    assert "there is no machine 'nosuch'; there is: box\nhint: vmtasks run -d --name NAME" in said
    assert "hint: did you mean box?" in cli.bad("ssh", "bux", "true")
    assert time.monotonic() - began < 15


# -- files


def test_b23_cp_both_ways(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "a b.bin"
    source.write_bytes(os.urandom(300_000))
    source.chmod(0o741)
    cli.good("cp", str(source), "box:ü c.bin")
    assert cli.good("exec", "box", "stat", "-c", "%a", "ü c.bin") == "741\n"
    cli.good("cp", "box:ü c.bin", str(tmp_path / "back"))
    assert digest(tmp_path / "back") == digest(source)
    assert stat.S_IMODE((tmp_path / "back").stat().st_mode) == 0o741
    folder = tmp_path / "-folder"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "f:1").write_text("x")
    cli.good("cp", str(folder), "box:/tmp/copied")
    cli.good("cp", "box:/tmp/copied", str(tmp_path / "again"))
    assert (tmp_path / "again" / "in" / "f:1").read_text() == "x"
    assert "nosuch" in cli.bad("cp", "box:nosuch", str(tmp_path))
    assert "there is no" in cli.bad("cp", str(tmp_path / "nosuch"), "box:")
    cli.bad("cp", str(source), str(tmp_path), status=2)


@pytest.mark.exhaustive
def test_b24_b25_b26_b28_the_printed_configuration_serves_other_programs(cli: Cli, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(cli.good("ssh-config", "box"))
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "file").write_text("1")
    (tmp_path / "tree" / "Makefile").write_text("it:\n\techo made >$@\nno:\n\texit 3\n")
    assert subprocess.run(["ssh", "-F", config, "box", "true"], check=False, timeout=60).returncode == 0
    sync = [
        "rsync",
        "-a",
        "--delete",
        "--out-format=%n",
        "-e",
        RSYNC_E.format(config),
        f"{tmp_path}/tree/",
        "box:tree/",
    ]
    assert "sub/file" in subprocess.run(sync, check=True, capture_output=True, text=True, timeout=60).stdout
    assert subprocess.run(sync, check=True, capture_output=True, text=True, timeout=60).stdout == ""
    (tmp_path / "tree" / "sub" / "file").unlink()
    subprocess.run(sync, check=True, timeout=60, capture_output=True)
    assert cli.good("ssh", "box", "find tree -type f") == "tree/Makefile\n"
    assert cli("ssh", "box", "make -C tree it").returncode == 0
    assert cli("ssh", "box", "make -C tree no").returncode == 2
    batch = tmp_path / "batch"
    batch.write_text(f"get tree/it {tmp_path}/it\nput {batch} batch\nls\n")
    done = subprocess.run(["sftp", "-F", config, "-b", batch, "box"], check=False, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "it").read_text() == "made\n"


# -- forwards


def test_b12_forwards_of_every_kind(cli: Cli) -> None:
    cli("ssh", "box", "mkdir -p www; echo served >www/index.html; busybox httpd -p 8080 -h www")
    local, remote, dynamic = free_port(), 18081, free_port()
    with here() as port:
        words = ["-L", f"{local}:127.0.0.1:8080", "-R", f"{remote}:127.0.0.1:{port}", "-D", str(dynamic)]
        forward = cli.start("forward", "box", *words)
        try:
            until(lambda: open_port(local) or forward.poll() is not None, 30, "the forward")
            assert get(local) == "served\n"
            assert cli.good("exec", "box", "wget", "-qO-", f"http://127.0.0.1:{remote}/") == "from the host\n"
            with socks(dynamic, "localhost", 8080) as connection:
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
            assert answer.endswith(b"served\n")
        finally:
            forward.terminate()
            assert forward.wait(30) == -signal.SIGTERM
    assert not open_port(local)
    assert "127.0.0.1" in cli.bad("forward", "box", "-L", "0.0.0.0:1:h:2", status=2)


# -- keys


@pytest.mark.exhaustive
def test_b2_b4_the_key_is_the_machines_own(cli: Cli) -> None:
    key = Path(str(cli.machine("box")["key"]))
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    public = subprocess.check_output(["ssh-keygen", "-y", "-f", key], text=True).split()[1]
    assert public in cli.good("ssh", "box", "cat .ssh/authorized_keys")
    build = cli.project.store / "keys" / "id_ed25519"
    for user in ("dev", "root"):
        refused = login(cli, "box", build, "true", user=user)
        assert refused.returncode == 255
        assert b"Permission denied" in refused.stderr
        assert login(cli, "box", key, "true", user=user).returncode == 0


@pytest.mark.exhaustive
def test_b19_b20_b22_k32_several_people(cli: Cli, root: Path) -> None:
    carol = make_key(root / "carol")
    assert login(cli, "box", root / "alice", "true").returncode == 0
    assert login(cli, "box", root / "bob", "true").returncode == 0
    wrong = login(cli, "box", root / "carol", "true")
    assert (wrong.returncode, b"Permission denied" in wrong.stderr) == (255, True)
    cli.good("keys", "add", "box", str(carol))
    assert login(cli, "box", root / "carol", "true").returncode == 0
    listed = cli.json("keys", "list", "box")
    assert [item["comment"] for item in listed] == ["vmtasks box", "alice", "bob", "carol"]  # type: ignore[attr-defined]
    assert [item["machine"] for item in listed] == [True, False, False, False]  # type: ignore[attr-defined]
    cli.good("keys", "rm", "box", "alice")
    cli.good("keys", "rm", "box", str(carol))
    cli.good("keys", "rm", "box", listed[2]["fingerprint"])  # type: ignore[index]
    for name in ("alice", "bob", "carol"):
        assert login(cli, "box", root / name, "true").returncode == 255
    assert "keys rotate" in cli.bad("keys", "rm", "box", "vmtasks box")
    assert "no user" in cli.bad("keys", "add", "box", str(carol), "--user", "nosuch", status=2)
    cli.good("keys", "add", "box", str(carol), "--user", "root")
    assert login(cli, "box", root / "carol", "true", user="root").returncode == 0
    assert login(cli, "box", root / "carol", "true").returncode == 255


@pytest.mark.exhaustive
def test_b21_rotation_cuts_no_session(cli: Cli, tmp_path: Path) -> None:
    key = Path(str(cli.machine("box")["key"]))
    old = tmp_path / "old"
    old.write_bytes(key.read_bytes())
    old.chmod(0o600)
    with cli.start("ssh", "box", "echo in; read -r word; echo $word", stdin=subprocess.PIPE) as session:
        assert session.stdout is not None
        assert session.stdin is not None
        assert session.stdout.readline() == b"in\n"
        cli.good("keys", "rotate", "box")
        assert login(cli, "box", old, "true").returncode == 255
        assert login(cli, "box", old, "true", user="root").returncode == 255
        assert login(cli, "box", key, "true").returncode == 0
        assert cli("ssh", "box", "true").returncode == 0
        session.stdin.write(b"still here\n")
        session.stdin.close()
        assert session.stdout.read() == b"still here\n"
    assert session.returncode == 0
    assert key.read_bytes() != old.read_bytes()


@pytest.mark.exhaustive
def test_restart(cli: Cli) -> None:
    before = cli.machine("box")["pid"]
    cli.good("exec", "box", "sh", "-c", "echo kept >kept; sync")
    assert cli.good("restart", "box").startswith("ssh -F ")
    assert cli.machine("box")["pid"] != before
    assert cli.good("exec", "box", "cat", "kept") == "kept\n"


# -- the last resort


def test_b36_the_console_answers_without_ssh(cli: Cli) -> None:
    cli.good("ssh", "box", "doas sh -c 'kill $(cat /run/sshd.pid)' || :")
    assert "login:" in cli.good("console", "box", stdin=b"\n")
