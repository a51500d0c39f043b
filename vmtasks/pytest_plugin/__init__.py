"""pytest fixtures for machines: `vm`, one per test; `vm_session`, one per run; `vm_factory`, any number.

    def test_survives_a_power_cut(vm):
        vm.put("build/app", "app")
        vm.succeed("./app init")
        vm.crash()
        vm.start()
        assert vm.succeed("./app check").strip() == "whole"

A machine is made from the clean image of the configured guest, or of --vm-guest, and removed after its test.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

import vmtasks

if TYPE_CHECKING:
    from vmtasks import Machine

TAIL = 50
"""Console lines and journal entries in the report of a failed test."""

MACHINES = pytest.StashKey[list["Machine"]]()
KEPT_LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --vm-guest and --vm-keep."""
    group = parser.getgroup("vmtasks", "virtual machines")
    group.addoption("--vm-guest", metavar="GUEST[:SNAPSHOT]", default="", help="image to make machines from")
    group.addoption("--vm-keep", action="store_true", help="keep machines running after the tests")


def pytest_configure(config: pytest.Config) -> None:
    """Set up the list of kept machines."""
    config.stash[KEPT_LINES] = []


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest) -> Iterator[Callable[..., "Machine"]]:
    """Make machines: `vm_factory(image="", **options)`; all are removed after the test.

    `options` as for temp_machine(): name, memory="512M" or in bytes, disk_size, cpus, network, forwards, binds.
    """
    yield from _factory(request)


@pytest.fixture
def vm(vm_factory: Callable[..., "Machine"]) -> "Machine":
    """A running machine for one test."""
    return vm_factory()


@pytest.fixture(scope="session")
def vm_session(request: pytest.FixtureRequest) -> Iterator["Machine"]:
    """A running machine that all tests of this run share. It is not reset between tests."""
    for make in _factory(request):
        yield make()


def _factory(request: pytest.FixtureRequest) -> Iterator[Callable[..., "Machine"]]:
    """Yield a function that makes machines; then remove them."""
    config = request.config
    machines = request.node.stash.setdefault(MACHINES, [])
    with ExitStack() as stack:

        def make(image: str = "", **options: Any) -> "Machine":
            try:
                keep = config.getoption("--vm-keep")
                image = image or config.getoption("--vm-guest")
                project = vmtasks.Project.find(config.rootpath)
                machine = stack.enter_context(vmtasks.temp_machine(image, project=project, keep=keep, **options))
            except vmtasks.VmTasksError as error:
                pytest.fail(f"no machine could be made: {error}", pytrace=False)
            machines.append(machine)
            if keep:
                config.stash[KEPT_LINES].append(machine.ssh_line())
            return machine

        yield make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the machines' consoles and journals to the report of a failed test."""
    report = yield
    if report.failed and report.when in ("setup", "call"):
        used = [machine for node in item.listchain() for machine in node.stash.get(MACHINES, [])]
        for machine in used:
            report.sections.append((f"console of {machine.name}", "\n".join(machine.console(TAIL))))
            report.sections.append((f"journal of {machine.name}", "\n".join(machine.journal[-TAIL:])))
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print how to log in to the machines that --vm-keep has kept."""
    for line in config.stash[KEPT_LINES]:
        terminalreporter.write_line(f"kept: {line}")
