"""Folders of this host in a guest whose kernel has no 9p, so that they are copied; and what cannot be copied."""

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Cli, Done

from conftest import Project, free_port, until

pytestmark = pytest.mark.timeout(900)

SSHD_OFF = "doas sh -c 'kill $(pidof sshd)'"
HIDE = "doas sh -c 'echo x >$0/secret; chmod 600 $0/secret; echo y >$0/open'"


@pytest.fixture
def cli(tmp_path: Path, store: Path) -> Iterator[Cli]:
    """A project without a machine, which must be so again at the end."""
    made = Cli(Project(tmp_path / "project", store))
    made.run_folder.mkdir(exist_ok=True)
    yield made
    made("rm", "--all", "--force")
    made.nothing_left()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of this host."""
    made = tmp_path / "ours"
    made.mkdir()
    (made / "from host").write_text("ours\n")
    return made


def warnings(done: Done) -> list[str]:
    """Its lines that warn."""
    return [line for line in done.stderr.decode().splitlines() if line.startswith("warning: ")]


@pytest.mark.exhaustive
def test_b16_binds(cli: Cli, tmp_path: Path) -> None:
    """The guest's kernel has no 9p, so that these are copies, brought up to date around each command."""
    root = tmp_path
    for name in ("ours", "readonly"):
        (root / name).mkdir()
        (root / name / "from host").write_text(f"{name}\n")
    ours, ro, all_of_it = (
        f"{root}/ours:/work/o u r s",
        f"{root}/readonly:/work/readonly:ro",
        f"{root}/project:/work/all",
    )
    cli.make("a", "--bind", ours, "--bind", ro, "--bind", all_of_it, "--exclude", "/dodo.py")
    how = {bind["guest"]: bind["how"] for bind in cli.machine("a")["binds"]}  # type: ignore[attr-defined]
    assert how == {"/work/o u r s": "rsync", "/work/readonly": "rsync", "/work/all": "rsync"}
    assert (root / "project/.vm/run/a/id_ed25519").is_file()
    assert cli.good("ssh", "a", "cd /work/all && find . -name .vm; ls dodo.py config 2>&1 || true").splitlines()[
        1:
    ] == [
        "config:",
        "vm.toml",
    ]
    assert cli.good("ssh", "a", "cat '/work/o u r s/from host' '/work/readonly/from host'") == "ours\nreadonly\n"
    (root / "ours" / "from host").write_text("new\n")
    (root / "readonly" / "more").write_text("more\n")
    script = "cat '/work/o u r s/from host' /work/readonly/more; echo back >'/work/o u r s/from guest'"
    assert cli.good("ssh", "a", script) == "new\nmore\n"
    assert (root / "ours" / "from guest").read_text() == "back\n"
    (root / "ours" / "for the job").write_text("fresh\n")
    job = cli.good(
        "exec", "-d", "--cwd", "/work/o u r s", "a", "sh", "-c", "cat 'for the job'; echo done >'of the job'"
    )
    entry = json.loads((cli.project.state / "access.log").read_text().splitlines()[-1])
    assert (entry["verb"], entry["command"].split()[0], entry["status"]) == ("exec", "sh", 0)
    assert cli.good("attach", "a", job.strip()) == "fresh\n"
    assert (root / "ours" / "of the job").read_text() == "done\n"
    done = cli("exec", "--user", "root", "a", "touch", "/work/readonly/x")
    assert done.returncode == 1
    assert b"Read-only file system" in done.stderr
    assert sorted(path.name for path in (root / "readonly").iterdir()) == ["from host", "more"]
    cli.good("pause", "a")
    began = time.monotonic()
    said = cli.bad("exec", "a", "true")
    assert "cannot be brought up to date there: its CPU is paused" in said
    assert "vmtasks resume a" in said
    assert time.monotonic() - began < 10, "and it does not wait for SSH to give up"
    cli.good("resume", "a")
    cli("exec", "--user", "root", "a", "sh", "-c", "umask 77; echo x >'/work/o u r s/secret'")
    assert "running: a; nothing was removed" in cli.bad("rm", "a")
    done = cli("rm", "--force", "a")
    assert done.returncode == 0, done.stderr
    (warned,) = warnings(done)
    assert f"--bind {root}/ours:/work/o u r s: some newer files in the guest" in warned
    assert warned.endswith("; they are lost with the machine")
    assert cli.json("ps") == []


@pytest.mark.exhaustive
def test_b16_what_cannot_come_back_costs_no_status_and_no_end(cli: Cli, folder: Path) -> None:
    port = str(free_port())
    done = cli("run", "--ssh-port", port, "--bind", f"{folder}:/work", "--", f"{HIDE} /work; exit 7")
    assert done.returncode == 7, done.stderr
    (warned,) = warnings(done)
    assert f"--bind {folder}:/work: some newer files in the guest could not be copied back; the others were: " in warned
    assert '"/work/secret"' in warned
    assert "Permission denied" in warned
    assert warned.endswith("; they are lost with the machine")
    assert sorted(path.name for path in folder.iterdir()) == ["from host", "open"]
    assert cli.json("ps") == []
    cli.nothing_left()


@pytest.mark.exhaustive
def test_a_second_signal_cuts_copying_back_short(cli: Cli, folder: Path) -> None:
    fill = "head -c 150000000 /dev/urandom >/work/big; echo full; sleep 300"
    run = cli.start("run", "--ssh-port", str(free_port()), "--bind", f"{folder}:/work", "--", fill)
    assert run.stdout is not None
    assert run.stdout.readline() == b"full\n"
    run.terminate()
    until(lambda: list(folder.glob(".big*")) or run.poll() is not None, 60, "rsync to begin")
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGTERM, said
    assert (
        b"work: interrupted before all newer files in the guest were copied back; they are lost with the machine"
        in said
    )
    assert not (folder / "big").exists()
    cli.nothing_left()


@pytest.mark.exhaustive
def test_b16_a_machine_whose_folder_cannot_be_copied(cli: Cli, folder: Path) -> None:
    cli.make("a", "--bind", f"{folder}:/work")
    done = cli("ssh", "a", f"{HIDE} /work; exit 3")
    assert done.returncode == 3, done.stderr
    (warned,) = warnings(done)
    assert '"/work/secret"' in warned
    assert warned.endswith("; they stay in the guest, and the next command tries again")
    assert (folder / "open").read_text() == "y\n"
    # Nor can a folder of somebody else be brought up to date; then nothing runs on what is old, but who looks gets in.
    (folder / "theirs").mkdir()
    cli.good("ssh", "a", "doas chown root /work/theirs; doas rm /work/secret; sync")
    (folder / "theirs" / "new").write_text("new\n")
    said = cli.bad("exec", "a", "echo", "ran")
    assert f"--bind {folder}:/work: not everything is up to date there: " in said
    _, _, login = said.strip().partition("hint: to log in without copying: ")
    cli("stop", "a", "--force")
    assert len(warnings(cli("start", "a"))) == 1
    subprocess.run([*shlex.split(login), "doas chown dev /work/theirs"], check=True, timeout=60)
    assert cli.good("exec", "a", "cat", "/work/theirs/new") == "new\n"

    cli("ssh", "a", SSHD_OFF)
    done = cli("exec", "a", "true")
    assert done.returncode == 125, done.stderr
    assert b"error: banner: " in done.stderr
    assert b"rsync" not in done.stderr
    done = cli("stop", "a")
    assert done.returncode == 0, done.stderr
    (warned,) = warnings(done)
    assert (
        f"--bind {folder}:/work: newer files in the guest could not be copied back: rsync could not connect, or lost"
        in warned
    )
    assert b"stopped (ACPI power button)" in done.stderr


@pytest.mark.exhaustive
def test_b16_a_path_where_the_user_cannot_write(cli: Cli, folder: Path) -> None:
    said = cli.bad("run", "--ssh-port", str(free_port()), "--bind", f"{folder}:/usr", "--", "true")
    error = said[said.index("error: ") :].splitlines()
    assert error == [
        f"error: --bind {folder}:/usr: dev cannot write to /usr in the guest: Permission denied",
        "hint: choose another path of the guest, or --user root",
    ]
    assert len(said.splitlines()) < 8, said
    cli.nothing_left()
