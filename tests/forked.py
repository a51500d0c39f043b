"""Command lines in processes of their own that need not import the package first: forked from a server that has it."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

PRELOAD = ["typer", "rich.console", "rich.table", "vmtasks.cli.common", "vmtasks.machines.project"]
"""What any command imports. Not the modules of verbs: which of them a command loads is a part of what is tested."""

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOAD)


def run_command_line(
    *words: str, cwd: Path, env: Mapping[str, str], timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `vmtasks WORDS` with /dev/null as its stdin. TimeoutExpired after `timeout_s`; it is killed then."""
    text = {"mode": "w+", "encoding": "utf-8", "errors": "surrogateescape"}
    with tempfile.TemporaryFile(**text) as out, tempfile.TemporaryFile(**text) as err:
        paths = [f"/proc/{os.getpid()}/fd/{stream.fileno()}" for stream in (out, err)]
        child = SERVER.Process(target=_main, args=(words, str(cwd), dict(env), paths))
        child.start()
        child.join(timeout_s)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(words, timeout_s)
        return subprocess.CompletedProcess(words, child.exitcode, out.read(), err.read())


def _main(words: tuple[str, ...], cwd: str, env: dict[str, str], paths: list[str]) -> None:
    """Become the command: its streams, environment, folder and arguments."""
    for number, path in enumerate(["/dev/null", *paths]):
        opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, "w" if number else "r", closefd=False) for number in range(3)
    )
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["vmtasks", *words]
    from vmtasks.cli import main  # noqa: PLC0415 - in the process that was forked

    main()
