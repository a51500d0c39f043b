"""pytest fixtures for machines: `vm`, one for a test; `vm_session`, one for all; `vm_factory`, as many as you like.

    def test_survives_a_power_cut(vm):
        vm.put("build/app", "app")
        vm.succeed("./app init")
        vm.crash()
        vm.start()
        assert vm.succeed("./app check").strip() == "whole"

A machine comes from the clean image of the configured guest, or of --vm-guest. It is gone when its test has ended.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vmtasks.machines import Machine

TAIL = 50
"""Lines of a console, and entries of a journal, that the report of a failed test shows."""

OURS = pytest.StashKey[list["Machine"]]()
KEPT = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--vm-guest and --vm-keep."""
    group = parser.getgroup("vmtasks", "virtual machines")
    group.addoption("--vm-guest", metavar="GUEST[:SNAPSHOT]", default="", help="what machines are made from")
    group.addoption("--vm-keep", action="store_true", help="keep machines, running, for a look inside")


def pytest_configure(config: pytest.Config) -> None:
    """Nothing is kept yet."""
    config.stash[KEPT] = []


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest) -> Iterator[Callable[..., "Machine"]]:
    """Makes machines: `vm_factory(image="", **wants)`; all are gone when the test has ended.

    `wants` as for temp_machine(): name, memory="512M" or in bytes, disk_size, cpus, network, forwards, binds.
    """
    yield from _factory(request)


@pytest.fixture
def vm(vm_factory: Callable[..., "Machine"]) -> "Machine":
    """A running machine of the test's own."""
    return vm_factory()


@pytest.fixture(scope="session")
def vm_session(request: pytest.FixtureRequest) -> Iterator["Machine"]:
    """A running machine that all tests of this run share, whatever they leave in it."""
    for make in _factory(request):
        yield make()


def _factory(request: pytest.FixtureRequest) -> Iterator[Callable[..., "Machine"]]:
    """A function that makes machines, and their end after the yield."""
    from vmtasks.errors import VmTasksError  # noqa: PLC0415
    from vmtasks.machines import Project, temp_machine  # noqa: PLC0415

    config = request.config
    known = request.node.stash.setdefault(OURS, [])
    with ExitStack() as stack:

        def make(image: str = "", **wants: Any) -> "Machine":
            try:
                keep = config.getoption("--vm-keep")
                image = image or config.getoption("--vm-guest")
                project = Project.find(config.rootpath)
                made = stack.enter_context(temp_machine(image, project=project, keep=keep, **wants))
            except VmTasksError as error:
                pytest.fail(f"no machine could be made: {error}", pytrace=False)
            known.append(made)
            if keep:
                config.stash[KEPT].append(made.ssh_line())
            return made

        yield make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the machines said, where a test that uses them has failed."""
    report = yield
    if report.failed and report.when in ("setup", "call"):
        session = [made for node in item.listchain() for made in node.stash.get(OURS, [])]
        for made in session:
            report.sections.append((f"console of {made.name}", "\n".join(made.console(TAIL))))
            report.sections.append((f"journal of {made.name}", "\n".join(made.journal[-TAIL:])))
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what --vm-keep has kept, and how to get in."""
    for line in config.stash[KEPT]:
        terminalreporter.write_line(f"kept: {line}")
