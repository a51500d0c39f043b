"""docs/python.md: each block of Python runs as it stands, and prints what stands under it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Cli

from conftest import REPOSITORY, Project

EXAMPLE = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENT = (REPOSITORY / "docs/python.md").read_text()
EXAMPLES = EXAMPLE.findall(DOCUMENT)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Cli]:
    """A project with the machine that the document speaks of."""
    project = Project(tmp_path_factory.mktemp("python") / "project", store)
    cli = Cli(project)
    cli.make("dev")
    yield cli
    cli("rm", "--all", "--force")
    cli.nothing_left()
    project.clean_up()


def run(cli: Cli, code: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, in the project."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cli.project.root, env=cli.env(), capture_output=True, check=False, text=True,
        stdin=subprocess.DEVNULL, timeout=240,
    )  # fmt: skip


def test_every_block_of_python_has_its_output_under_it() -> None:
    assert len(EXAMPLES) == DOCUMENT.count("```python\n") > 5


@pytest.mark.parametrize(("code", "output"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_prints_what_the_document_says(dev: Cli, code: str, output: str) -> None:
    done = run(dev, code)
    assert (done.returncode, done.stdout, done.stderr) == (0, output, ""), done.stderr


STATUS = """
import logging, sys
from vmtasks import Project

dev = Project.here().machine("dev")
dev.start()
logging.basicConfig(stream=sys.stdout, format="%(message)s")
logging.getLogger("vmtasks").setLevel(logging.DEBUG)
print([dev.status().status for _ in range(3)])
dev.execute("true")
"""


@pytest.mark.exhaustive
def test_the_status_of_a_machine_that_is_up_costs_no_login_and_runs_no_program(dev: Cli) -> None:
    done = run(dev, STATUS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "['running', 'running', 'running']", done.stdout


LATE = """
from vmtasks import Project
from vmtasks.machines import start
from vmtasks.qemu.events import Events

dev = Project.here().machine("dev")
dev.stop()
record = start.start_qemu(dev.place, dev.place.record())
network = Events(dev.place.events).network_up
print(dev.status().status, network())
record, connection = start.reach(dev.place, record)
print(dev.place.record().ready)
start.personalize(dev.place, record, connection)
print(dev.place.record().ready, network(), dev.succeed("hostname"), end="")
"""


@pytest.mark.exhaustive
def test_the_three_steps_of_a_start_can_be_called_apart(dev: Cli) -> None:
    done = run(dev, LATE)
    assert (done.returncode, done.stdout) == (0, "booting False\nFalse\nTrue True dev\n"), done.stderr


THREADS = """
import threading
from concurrent.futures import ThreadPoolExecutor
from vmtasks import Project, temp_machine
from vmtasks.host.progress import Lines, observing

dev = Project.here().machine("dev")
dev.start()
heard = {"one": [], "two": []}


def use(machine, number):
    said = [machine.succeed(f"echo {number} {turn}; sleep 0.1") for turn in range(5)]
    assert said == [f"{number} {turn}\\n" for turn in range(5)], said
    assert machine.succeed("cat", stdin=bytes([48 + number]) * 100000) == str(number) * 100000
    return machine.name


def own(name, ready):
    with observing(Lines(heard[name].append)), temp_machine("tiny", name=name, memory="128M") as machine:
        ready.wait(300)
        with ThreadPoolExecutor(8) as threads:
            return set(threads.map(lambda number: use((machine, dev)[number % 2], number), range(8)))


with ThreadPoolExecutor(2) as makers:
    ready = threading.Barrier(2)
    used = list(makers.map(lambda name: own(name, ready), heard))
print(used == [{"one", "dev"}, {"two", "dev"}], sorted(Project.here().names()))
for name, other in (("one", "two"), ("two", "one")):
    lines = " ".join(heard[name])
    print(f"start {name}: done" in lines, f"start {other}" in lines)
"""


@pytest.mark.exhaustive
def test_eight_threads_use_each_of_two_machines_and_each_observer_hears_its_own(dev: Cli) -> None:
    """Sixteen threads in all, half of them on one machine that both have."""
    done = run(dev, THREADS)
    expected = "True ['dev']\nTrue False\nTrue False\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, ""), done.stderr
