"""Many machines on record: what is not over costs no command anything, and what is looked at is read once."""

import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from vmtasks.host import processes, progress
from vmtasks.images.workspace import MachineRecord
from vmtasks.machines import Project
from vmtasks.store import records, store

MANY = 100


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Stopped machines, in no project."""
    made = Project(None, {"HOME": str(tmp_path), "VM_DIR": str(tmp_path / "vm"), "VMTASKS_STORE": str(tmp_path / "s")})
    for number in range(MANY):
        write(made, f"m{number}")
    return made


def write(project: Project, name: str, **values: object) -> None:
    record = MachineRecord(
        name=name, guest="tiny", snapshot="clean", image="a" * 64, image_sha256="b" * 64, ssh_user="dev",
        host_keys=["ssh-ed25519 AAAA"], family="tiny", own=True, network=name,
    )  # fmt: skip
    folder = project.config().vm_dir / "run" / name
    folder.mkdir(parents=True)
    store.write_record(folder / "machine.toml", msgspec.structs.replace(record, **values))


def parsed() -> int:
    """How often a record's text was asked for as TOML so far."""
    info = records._parsed.cache_info()
    return info.hits + info.misses


def test_no_record_is_parsed_to_find_what_is_over(project: Project) -> None:
    before = parsed()
    assert project.reap() == []
    assert parsed() == before


def test_each_record_is_parsed_once_for_a_list(project: Project) -> None:
    records._parsed.cache_clear()
    assert {one.status().status for one in project.machines()} == {"stopped"}
    assert records._parsed.cache_info().misses == MANY


def test_a_lease_that_has_run_out_ends_a_machine_and_one_that_was_renewed_does_not(project: Project) -> None:
    now = time.time()
    write(project, "over", lease_until=now - 1)
    write(project, "lives", lease_until=now + 3600)
    write(project, "renewed", lease_until=now - 1)
    project.machine("renewed").renew(3600)
    said: list[str] = []
    with progress.observing(progress.Lines(said.append)):
        assert project.reap() == ["over"]
    assert said == ["machine over: removed, because its lease has run out"]
    assert {"lives", "renewed"} <= set(project.names())
    project.machine("lives").renew(0)
    record = project.machine("lives").place.record()
    assert record is not None
    assert record.lease_until == 0.0


def test_a_machine_of_a_process_that_is_gone_is_over(project: Project) -> None:
    with subprocess.Popen(["sleep", "300"]) as owner:
        write(project, "its", owner=owner.pid, owner_started=processes.started(owner.pid))
        assert project.reap() == []
        owner.kill()
    assert project.reap() == ["its"]


def test_machines_are_imported_without_paramiko() -> None:
    code = "import sys, vmtasks.machines; sys.exit('paramiko' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_public_names_are_there_and_nothing_is_imported_before_they_are_used() -> None:
    code = (
        "import sys, vmtasks; assert not [name for name in sys.modules if name.startswith('vmtasks.')]\n"
        "from vmtasks import *; from vmtasks import Machine, Project, temp_machine, CommandResult, VmTasksError\n"
        "assert set(vmtasks.__all__) <= set(dir(vmtasks)); assert 'paramiko' not in sys.modules\n"
        "try: vmtasks.Nothing\nexcept AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == "module 'vmtasks' has no attribute 'Nothing'\n"
