"""What is sent to a guest to run: through any login shell, csh too, as another user; and ssh's own files."""

import os
import pwd
import secrets
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from unit.shellserver import serving
from vmtasks.guest import ssh
from vmtasks.host import process, processes

LOGIN_SHELLS = {
    name: [path, *words, "-c"]
    for name, words in {"sh": (), "dash": (), "bash": (), "busybox": ("sh",), "csh": (), "tcsh": (), "zsh": ()}.items()
    if (path := shutil.which(name))
}
ME = pwd.getpwuid(os.getuid()).pw_name
ODD = [
    "it's",
    'a "b"',
    "$HOME `id` $(id) ${x}",
    "back\\slash \\n \\0",
    "!! !x a!b",
    "a\nb\n\nc",
    "é€😀",
    "-n",
    "",
    "*",
    "~",
    "%s %d",
    "#",
]
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20) | st.sampled_from(ODD)


def login(shell: str, line: str, *, home: Path, stdin: str = "", **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run a command line as sshd does: by the user's login shell, in the user's home."""
    environ = {"HOME": str(home), "PATH": os.environ["PATH"], "LC_ALL": "C", **environ}
    done = subprocess.run(
        [*LOGIN_SHELLS[shell], line],
        cwd=home,
        env=environ,
        input=stdin.encode(),
        capture_output=True,
        timeout=20,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_shells_to_test_with():
    assert {"sh"} <= set(LOGIN_SHELLS)


@pytest.mark.parametrize("shell", LOGIN_SHELLS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(WORDS, max_size=4))
@example(words=ODD)
def test_any_login_shell_hands_a_command_on_unchanged(shell: str, words: list[str], tmp_path: Path):
    text = f"printf '<%s>' {process.quote(words)}; exit 7"
    done = login(shell, ssh.remote_line(text), home=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("".join(f"<{w}>" for w in words) or "<>", "", 7)


@pytest.mark.parametrize("shell", LOGIN_SHELLS)
def test_a_script_of_several_lines(shell: str, tmp_path: Path):
    text = "for word in a b; do\n    # it's a comment!\n    cat <<END\n$word \\$word\nEND\ndone\ntest -z '' && exit 3"
    done = login(shell, ssh.remote_line(text), home=tmp_path)
    assert (done.stdout, done.returncode) == ("a $word\nb $word\n", 3)


# ---- folder, environment, status


@pytest.mark.parametrize("shell", LOGIN_SHELLS)
@pytest.mark.parametrize("folder", ["src", "odd $HOME 'n\"ame'\n!", "../up", "-n"])
def test_a_script_runs_in_its_folder_with_its_environment(shell: str, folder: str, tmp_path: Path):
    home = tmp_path / "home"
    (home / folder).mkdir(parents=True)
    env = {f"V{n}": value for n, value in enumerate(ODD)}
    command = "pwd; " + "; ".join(f'printf "<%s>" "$V{n}"' for n in range(len(ODD)))
    for cwd in (folder, str(home / folder)):
        done = login(shell, ssh.remote_line(ssh.script(command, cwd=cwd, env=env)), home=home)
        assert done.stderr == ""
        assert done.stdout == f"{os.path.normpath(home / folder)}\n" + "".join(f"<{value}>" for value in ODD)


def test_a_script_in_a_folder_that_is_missing_does_not_run(tmp_path: Path):
    done = login("sh", ssh.remote_line(ssh.script("echo ran", cwd="none", env={})), home=tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "none" in done.stderr


@pytest.mark.parametrize(
    "command",
    ["exit 5", "(exit 5)", "sh -c 'exit 5'", "exit 5 # comment", "f() { return 5; }\nf", "true; false || exit 5"],
)
def test_the_status_is_the_commands(command: str, tmp_path: Path):
    assert login("sh", ssh.remote_line(ssh.script(command, cwd=".", env={})), home=tmp_path).returncode == 5


def test_output_input_and_status_as_execute_sends_it(tmp_path: Path):
    text = ssh.script("echo out; echo err >&2; cat; exit 4", cwd=".", env={})
    done = login("sh", ssh.remote_line(f"{{ {text}\n}} 2>&1 </dev/null"), home=tmp_path, stdin="not for it")
    assert (done.stdout, done.stderr, done.returncode) == ("out\nerr\n", "", 4)


# ---- another user


def stub(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


STUB = 'printf "%s\\n" "{name}: $1 $2 $3" >&2\nshift 3\nHOME=/elsewhere exec "$@"'


@pytest.fixture(scope="module")
def plain_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with all that this host has, but neither doas nor sudo."""
    folder = tmp_path_factory.mktemp("programs")
    folder.chmod(0o755)
    for place in map(Path, os.environ["PATH"].split(":")):
        for program in place.iterdir() if place.is_dir() else ():
            link = folder / program.name
            if program.name not in {"doas", "sudo"} and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


@pytest.mark.parametrize("shell", LOGIN_SHELLS)
@pytest.mark.parametrize("name", ["doas", "sudo"])
def test_another_user_is_reached_through_what_the_guest_has(shell: str, name: str, tmp_path: Path, plain_path: str):
    home = tmp_path / "home"
    (home / "src").mkdir(parents=True)
    stub(tmp_path / "bin", name, STUB.format(name=name))
    text = ssh.script('pwd; echo "$V"; exit 6', cwd="src", env={"V": "it's\n!"}, user="so me")
    path = f"{tmp_path}/bin:" + plain_path
    done = login(shell, ssh.remote_line(text), home=home, PATH=path)
    assert done.stderr == f"{name}: -n -u so me\n"
    assert done.stdout == f"{home}/src\nit's\n!\n", "relative to the login user's home, not to the other's"
    assert done.returncode == 6


def test_doas_comes_before_sudo(tmp_path: Path):
    for name in ("doas", "sudo"):
        stub(tmp_path / "bin", name, STUB.format(name=name))
    done = login(
        "sh",
        ssh.remote_line(ssh.script("true", cwd=".", env={}, user="x")),
        home=tmp_path,
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
    )
    assert done.stderr.startswith("doas: ")


def test_who_is_that_user_already_needs_neither(tmp_path: Path):
    for name in ("doas", "sudo"):
        stub(tmp_path / "bin", name, "exit 99")
    text = ssh.script("id -un", cwd=".", env={}, user=ME)
    assert (
        login("sh", ssh.remote_line(text), home=tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}").stdout
        == f"{ME}\n"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user through su")
@pytest.mark.parametrize("shell", LOGIN_SHELLS)
def test_root_without_doas_and_sudo_uses_su(shell: str, tmp_path: Path, plain_path: str):
    home = tmp_path / "home"
    (home / "src").mkdir(parents=True)
    for folder in (home, *home.parents[:4]):
        if str(folder).startswith("/tmp/"):  # noqa: S108 - where pytest puts its folders
            folder.chmod(folder.stat().st_mode | 0o055)
    text = ssh.script('id -un; pwd; echo "$V"; exit 6', cwd="src", env={"V": "it's $x\n!"}, user="nobody")
    path, own = plain_path, "/bin/sh" if shell == "busybox" else LOGIN_SHELLS[shell][0]
    done = login(shell, ssh.remote_line(text), home=home, PATH=path, SHELL=own)
    assert (done.stdout, done.returncode) == (f"nobody\n{home}/src\nit's $x\n!\n", 6), done.stderr


def test_a_guest_where_nobody_can_be_become(tmp_path: Path, plain_path: str):
    stub(tmp_path / "bin", "id", "case $1 in -u) echo 1000 ;; *) echo dev ;; esac")
    environ = {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:" + plain_path}
    line = ssh.remote_line(ssh.script("echo ran", cwd=".", env={}, user="root"))
    done = subprocess.run(["/bin/sh", "-c", line], env=environ, capture_output=True, text=True, timeout=20, check=False)
    assert (done.stdout, done.returncode) == ("", 126)
    assert done.stderr == "the guest has neither doas nor sudo: cannot become root\n"


# ---- sessions


@pytest.mark.parametrize("shell", LOGIN_SHELLS)
@pytest.mark.parametrize(
    "leads", [pytest.param(True, id="OpenSSH"), pytest.param(False, id="dropbear", marks=pytest.mark.exhaustive)]
)
def test_a_session_is_ended_with_all_that_it_has_started_and_nothing_else(shell: str, tmp_path: Path, *, leads: bool):
    mark, other = (f"vmtasks-{secrets.token_hex(8)}" for _ in range(2))
    text = "sh -c 'trap \"\" TERM; echo $$ >it!; while :; do sleep 1; done' & wait; echo $?"
    command = [*LOGIN_SHELLS[shell], ssh.session_line(f": {mark}\n{text}\nexit $?")]
    bystander = ["/bin/sh", "-c", f": {other}\nsleep 60\nexit $?"]
    end = ssh.remote_line(ssh.end_marked_script(mark))
    with (
        subprocess.Popen(command, cwd=tmp_path, start_new_session=leads) as child,
        subprocess.Popen(bystander, start_new_session=True) as left,
    ):
        while not (tmp_path / "it!").exists() or not (tmp_path / "it!").read_text():
            time.sleep(0.02)
        started = int((tmp_path / "it!").read_text())
        ended = login(shell, end, home=tmp_path)
        assert (ended.stdout, ended.stderr, ended.returncode) == ("", "", 0)
        assert child.wait(5) in (-signal.SIGTERM, 128 + signal.SIGTERM)
        deadline = time.monotonic() + 5
        while processes.started(started):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert left.poll() is None
        assert login(shell, end, home=tmp_path).returncode == 0, "also when there is nothing to end"
        os.killpg(left.pid, signal.SIGKILL)


def test_a_session_has_its_input_and_status(tmp_path: Path):
    line = ssh.session_line("read -r a; echo \"$a!\"; printf '%s\\n' 'it'\\''s'; exit 9")
    done = login("sh", line, home=tmp_path, stdin="one\ntwo\n")
    assert (done.stdout, done.stderr, done.returncode) == ("one!\nit's\n", "", 9)


# ---- ssh's own files


@pytest.mark.skipif(not shutil.which("ssh"), reason="OpenSSH is not installed")
@pytest.mark.parametrize("name", ["plain", 'it\'s a "folder"', "100%h", "a\\b", "#x", "ü"])
def test_openssh_reads_its_configuration_as_it_was_meant(name: str, tmp_path: Path):
    folder = tmp_path / name
    folder.mkdir()
    target = ssh.Target("vm-1", 22220, "dev", folder / "id_ed25519", ("ssh-ed25519 AAAA", "ssh-rsa BBBB"), folder)
    ssh.write_config(target)
    assert target.config.stat().st_mode & 0o777 == 0o600
    assert (folder / "known_hosts").read_text() == "vm-1 ssh-ed25519 AAAA\nvm-1 ssh-rsa BBBB\n"
    said = subprocess.run(["ssh", "-G", "-F", target.config, "vm-1"], capture_output=True, text=True, check=True).stdout
    known = dict(line.partition(" ")[::2] for line in said.splitlines())
    assert known["hostname"] == "127.0.0.1"
    assert (known["port"], known["user"], known["hostkeyalias"]) == ("22220", "dev", "vm-1")
    assert known["stricthostkeychecking"] in {"true", "yes"}
    assert known["batchmode"] == "yes"
    assert known["identityfile"].replace("%%", "%") == str(folder / "id_ed25519")
    assert known["controlpath"].replace("%%", "%") in {str(folder / "ssh-dev"), str(folder / "ssh-%r")}
    assert str(folder / "known_hosts") in known["userknownhostsfile"].replace("%%", "%")


def test_an_openssh_that_cannot_choose_chooses_as_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As one of before 8.0, or one that may not use curve25519."""
    program = tmp_path / "ssh"
    program.write_text("#!/bin/sh\necho 'Bad SSH2 KexAlgorithms' >&2\nexit 255\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    ssh.kex_lines.cache_clear()
    assert ssh.kex_lines() == ()
    ssh.kex_lines.cache_clear()


@pytest.mark.parametrize(("said", "line"), [("new\nlast line\n", "last line"), ("", "ssh gave no reason")])
def test_what_ssh_printed_last(said: str, line: str):
    assert ssh.last_line(said) == line


LONG = {
    "quotes": ["printf", "%s", "'" * 3000],
    "beyond ASCII": ["printf", "%s", "é€😀" * 7000],
    "two of 100 kB": ["printf", "%s", "x" * 100_000, "'y" * 20_000 + "z" * 60_000],
    "lines": ["printf", "%s", "a\nb'c!\\n\\0" * 2000 + "\n\n"],
}


@pytest.mark.parametrize("words", LONG.values(), ids=LONG)
@pytest.mark.parametrize("tree", ["", "src"])
def test_a_session_takes_words_as_long_as_the_system_does(words: list[str], tree: str, tmp_path: Path):
    """OpenSSH's client, a real server, its shell: as it is run where no SSH is between."""
    with serving(tmp_path / "home") as target:
        (tmp_path / "home/src").mkdir()
        ssh.write_config(target)
        command = f'printf \'%s|\' "$PWD" "$V"; cat; {shlex.join(words)}'
        argv = ssh.session_argv(target, f"vmtasks-{1:016x}", command, cwd=tree, env={"V": "it's\n"})
        try:
            done = process.run(argv, timeout_s=60, check=False, stdin="stdin é")
        finally:
            ssh.close(target)
        folder = str((tmp_path / "home" / tree).resolve())
        assert (done.stdout, done.status) == (f"{folder}|it's\n|stdin é" + "".join(words[2:]), 0)
        assert not list((tmp_path / "home").glob(".vmtasks/scripts/*")), "it removes itself"
