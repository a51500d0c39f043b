"""Disks and keys that lie in the tree that is synced, or in a folder that is bound: nothing of them reaches a guest."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import nearby
import pytest
from shellserver import serving

from amount import cases
from vmtasks.config.arguments import Bind
from vmtasks.config.load import load
from vmtasks.config.scaffold import scaffold
from vmtasks.errors import BindError, CommandError, ConfigError
from vmtasks.guest import connect, sync
from vmtasks.images import prune
from vmtasks.images.private import Private
from vmtasks.images.workspace import BindRecord, MachineRecord
from vmtasks.machines import binds, start
from vmtasks.machines.folder import Place
from vmtasks.qemu.accel import Accel
from vmtasks.store.store import Store
from vmtasks.suites.results import Results
from vmtasks.suites.run import send

pytestmark = pytest.mark.skipif(
    subprocess.run(["which", "rsync"], capture_output=True, check=False).returncode != 0,
    reason="rsync is not installed",
)

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----\n"  # noqa: S105 - what a key begins with


def state_folder(folder: Path) -> Path:
    """As a project with a machine of `vmtasks run` has it."""
    machine = folder / "run/dev"
    machine.mkdir(parents=True)
    (machine / "id_ed25519").write_text(SECRET)
    (machine / "machine.toml").write_text("")
    (machine / "disk.qcow2").write_text(SECRET)
    (folder / "access.log").touch()
    return folder


def store_folder(folder: Path) -> Path:
    for name in ("keys/id_ed25519", "keys/snapshots/0123", "images/0123.qcow2"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET)
    return folder


def nested_project(root: Path) -> dict[str, str]:
    scaffold(root / "sub/other", "tiny")
    state_folder(root / "sub/other/.vm")
    return {}


def through_a_link(root: Path) -> dict[str, str]:
    state_folder(root / "data/vm")
    (root / ".vm").symlink_to("data/vm")
    return {}


def a_copy(root: Path) -> dict[str, str]:
    state_folder(root / "backup/state").joinpath("access.log").unlink()
    return {}


def a_machine_without_a_record(root: Path) -> dict[str, str]:
    """In the state folder of a project that is not registered."""
    machine = state_folder(root / "other/.vm") / "run/dev"
    (machine / "machine.toml").unlink()
    (machine / "disk.qcow2").unlink()
    return {}


def hard_link(root: Path) -> dict[str, str]:
    state_folder(root / ".vm")
    os.link(root / ".vm/run/dev/id_ed25519", root / "key")
    return {}


def registered(root: Path) -> dict[str, str]:
    """What another project has told the store of; it has no machine yet."""
    (root / "elsewhere/tiny").mkdir(parents=True)
    (root / "elsewhere/tiny/phase-1.iso").write_text(SECRET)
    store = store_folder(root.parent / "store")
    prune.register(Store(store), root / "elsewhere")
    return {"VMTASKS_STORE": str(store)}


def registered_before(root: Path) -> dict[str, str]:
    """As an older version did."""
    environ = registered(root)
    for entry in Path(environ["VMTASKS_STORE"]).glob("projects/*"):
        entry.unlink()
    Path(environ["VMTASKS_STORE"], "projects/1").write_text(f"{root}/elsewhere\n")
    return environ


LAYOUTS: dict[str, Callable[[Path], dict[str, str]]] = {
    "as always": lambda root: state_folder(root / ".vm") and {},
    "a name that a pattern would not match": lambda root: {"VM_DIR": str(state_folder(root / "a[b]*\\c?"))},
    "deep": lambda root: {"VM_DIR": str(state_folder(root / "var/lib/vm"))},
    "by a link": through_a_link,
    "by VM_DIR through a link": lambda root: (
        state_folder(root / "real/vm"), (root / "link").symlink_to("real"), {"VM_DIR": str(root / "link/vm")},
    )[-1],
    "a store": lambda root: {"VMTASKS_STORE": str(store_folder(root / "cache"))},
    "somebody's store": lambda root: store_folder(root / "home/.cache/vmtasks") and {},
    "another project": nested_project,
    "another project, registered": registered,
    "another project, registered by an older version": registered_before,
    "a copy of a machine's folder": a_copy,
    "a hard link to a key": hard_link,
    "a machine without a record": a_machine_without_a_record,
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "project"
    scaffold(made, "tiny")
    (made / "main.c").write_text("int main;\n")
    return made


class There:
    """The place of a machine, and what its guest has."""

    def __init__(
        self,
        root: Path,
        environ: dict[str, str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        stack: contextlib.ExitStack,
    ) -> None:
        environ = {"VMTASKS_STORE": str(tmp_path / "store"), **environ}
        self.config = load(root, {}, {"HOME": str(tmp_path / "nobody"), **environ})
        self.place = Place(self.config, "dev")
        self.record = MachineRecord(
            name="dev", guest="tiny", snapshot="clean", image="", image_sha256="", ssh_user="dev", host_keys=[]
        )
        target = self.place.target(self.record)
        self.home = nearby.lead_here(tmp_path, monkeypatch, target.config)
        server = stack.enter_context(serving(self.home))
        self.target = replace(target, port=server.port, key=server.key, host_keys=server.host_keys)

    def leaked(self) -> list[Path]:
        return [path for path in self.home.rglob("*") if path.is_file() and SECRET in path.read_text()]

    def bound(self, host: Path, exclude: tuple[str, ...] = ()) -> MachineRecord:
        bind = binds.check(Bind(str(host), f"{self.home}/work", exclude=exclude), Private(self.config))
        chosen = binds.decide_copied(self.place, msgspec.structs.replace(self.record, binds=[bind]))
        return msgspec.structs.replace(
            chosen, binds=[msgspec.structs.replace(bind, how="rsync") for bind in chosen.binds]
        )


@pytest.fixture
def there(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., There]]:
    with contextlib.ExitStack() as stack:
        yield lambda environ=None: There(root, environ or {}, tmp_path, monkeypatch, stack)


# ---- sync


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("exclude", cases(["+ /.vm/***", "+ **"], more=[[], ["!"]]))
def test_nothing_private_is_synced(layout: str, exclude: list[str], root: Path, there: Callable[..., There]) -> None:
    guest = there(LAYOUTS[layout](root))
    table = msgspec.structs.replace(guest.config.sync, exclude=exclude)
    results = Results(msgspec.structs.replace(guest.config, sync=table))
    send(results, guest.target, lambda _: None)
    assert guest.leaked() == []
    assert (guest.home / "src/main.c").is_file()
    assert not list((guest.home / "src").rglob("machine.toml"))
    before = results.tree
    for machine in root.rglob("machine.toml"):
        machine.with_name("new").write_text("what a machine writes is no change of the tree")
    assert Results(results.config).tree == before


@pytest.mark.parametrize("source", [".vm", ".vm/results", "link"])
def test_a_tree_in_a_private_place_is_refused(source: str, root: Path, there: Callable[..., There]) -> None:
    state_folder(root / ".vm/").joinpath("results").mkdir()
    (root / "link").symlink_to(".vm/run")
    config = there().config
    config = msgspec.structs.replace(config, sync=msgspec.structs.replace(config.sync, source=source))
    with pytest.raises(ConfigError, match=r"sync.source = .*: it is in .*\.vm, where vmtasks keeps"):
        _ = Results(config).tree


# ---- binds


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_private_is_bound(layout: str, root: Path, there: Callable[..., There]) -> None:
    guest = there(LAYOUTS[layout](root))
    record = guest.bound(root)
    (bind,) = record.binds
    assert "never goes into a guest" in bind.copied, "by 9p the guest would have it"
    guest.place.state.accel = Accel("tcg", "max", "", 1.0, 0.0)
    assert start.qemu_spec(guest.place, record, 2222).shares == ()
    binds.push(guest.place, guest.target, 0, bind)
    assert guest.leaked() == []
    assert (guest.home / "work/main.c").is_file()


def test_a_guest_cannot_write_into_a_private_place(root: Path, there: Callable[..., There]) -> None:
    state_folder(root / ".vm")
    guest = there()
    record = guest.bound(root)
    binds.push(guest.place, guest.target, 0, record.binds[0])
    (guest.home / "work/.vm/run/dev").mkdir(parents=True)
    (guest.home / "work/.vm/run/dev/machine.toml").write_text("forged")
    (guest.home / "work/new.c").touch()
    guest.place.folder.mkdir(parents=True, exist_ok=True)
    binds.copy_out(guest.place, record)
    assert (root / "new.c").exists()
    assert (root / ".vm/run/dev/machine.toml").read_text() == ""


def test_a_folder_without_anything_private_is_shared(tmp_path: Path, there: Callable[..., There]) -> None:
    (tmp_path / "plain").mkdir()
    guest = there()
    record = guest.bound(tmp_path / "plain")
    assert [bind.copied for bind in record.binds] == [""]
    guest.place.state.accel = Accel("tcg", "max", "", 1.0, 0.0)
    assert [share.folder for share in start.qemu_spec(guest.place, record, 2222).shares] == [str(tmp_path / "plain")]


def test_what_came_into_a_shared_folder_later_is_said(
    tmp_path: Path, there: Callable[..., There], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain").mkdir()
    guest = there()
    record = guest.bound(tmp_path / "plain")
    record = msgspec.structs.replace(record, binds=[msgspec.structs.replace(record.binds[0], how="9p")])
    assert binds.copy_in(guest.place, record)
    assert capsys.readouterr().out == ""
    state_folder(tmp_path / "plain/state")
    assert binds.copy_in(guest.place, record)
    assert "warning: machine dev: --bind " in (said := capsys.readouterr().out)
    assert "state in it never goes into a guest, but the guest can read it" in said


@pytest.mark.parametrize("host", [".vm", ".vm/run/dev", "link", "cache/keys"])
def test_a_bind_of_a_private_place_is_refused(host: str, root: Path, there: Callable[..., There]) -> None:
    state_folder(root / ".vm")
    (root / "link").symlink_to(".vm/run")
    guest = there({"VMTASKS_STORE": str(store_folder(root / "cache"))})
    with pytest.raises(ConfigError, match="where vmtasks keeps disks and keys, and never goes into a guest") as refused:
        guest.bound(root / host)
    assert refused.value.exit_code == 2


def test_excludes_hold_both_ways(tmp_path: Path, there: Callable[..., There]) -> None:
    host = tmp_path / "host"
    for name in ("build/x", "a.o", "sub/a.o", "sub/build/x", "a.c"):
        (host / name).parent.mkdir(parents=True, exist_ok=True)
        (host / name).write_text("host")
    guest = there()
    record = guest.bound(host, ("/build/", "*.o"))
    assert record.binds[0].copied == "parts of it are excluded"
    binds.push(guest.place, guest.target, 0, record.binds[0])
    work = guest.home / "work"
    assert sorted(str(p.relative_to(work)) for p in work.rglob("*") if p.is_file()) == ["a.c", "sub/build/x"]
    (work / "b.o").write_text("guest")
    (work / "b.c").write_text("guest")
    guest.place.folder.mkdir(parents=True, exist_ok=True)
    binds.copy_out(guest.place, record)
    assert (host / "b.c").exists()
    assert not (host / "b.o").exists()


@pytest.mark.parametrize("pattern", ["", " ", "a\nb", "+ "])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"--exclude .*: an empty pattern or one with a line break"):
        Bind.parse("/a:/b", (pattern,))


# ---- what the guest has no room for


@pytest.fixture
def little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1 MiB on it is asked, and the guest has 2 MiB."""
    monkeypatch.setattr(sync, "ASK_BYTES", 1 << 20)
    (tmp_path / "bin").mkdir(exist_ok=True)
    df = tmp_path / "df"
    df.write_text("#!/bin/sh\necho Filesystem 1024-blocks Used Available\necho /dev/root 9000 7000 2048 78% /\n")
    df.chmod(0o755)


@pytest.mark.usefixtures("little_room")
def test_what_is_too_large_is_said_before_it_is_copied(tmp_path: Path, there: Callable[..., There]) -> None:
    host = tmp_path / "host"
    host.mkdir()
    (host / "small").write_text("x")
    (host / "large").write_bytes(os.urandom(3 << 20))
    guest = there()
    (tmp_path / "df").rename(tmp_path / "bin/df")
    record = guest.bound(host)
    with pytest.raises(CommandError, match=r"3 MiB are to be copied, and the guest has 2 MiB free at .*nothing was"):
        binds.push(guest.place, guest.target, 0, record.binds[0])
    assert not (guest.home / "work").exists()
    (guest.home / "work").mkdir()
    first = msgspec.structs.replace(record.binds[0], how="")
    with connect.connect(guest.target, timeout_s=20) as connection, pytest.raises(BindError) as refused:
        binds._first_copy(guest.place, connection, 0, first)
    assert "--exclude PATTERN" in refused.value.hint
    few = msgspec.structs.replace(record.binds[0], exclude=["large"])
    binds.push(guest.place, guest.target, 0, few)
    assert [path.name for path in (guest.home / "work").iterdir()] == ["small"]


@pytest.mark.usefixtures("little_room")
def test_what_is_there_already_needs_no_room(tmp_path: Path, there: Callable[..., There]) -> None:
    host = tmp_path / "host"
    host.mkdir()
    (host / "large").write_bytes(os.urandom(3 << 20))
    guest = there()
    bind = BindRecord(host=str(host), guest=f"{guest.home}/work", how="rsync")
    binds.push(guest.place, guest.target, 0, bind)
    (tmp_path / "df").rename(tmp_path / "bin/df")
    (host / "new").write_text("x")
    binds.push(guest.place, guest.target, 0, bind)
    assert (guest.home / "work/new").exists()
