"""What `prune` keeps: of projects that are away or moved, whose records cannot be read, or that are at work."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from test_store import all_of, damage, fill, make, publish, real

from forked import run_command_line
from vmtasks import cli
from vmtasks.errors import ConfigError
from vmtasks.host import process
from vmtasks.images import prune
from vmtasks.images.workspace import MachineRecord, PhaseRecord
from vmtasks.media import disk
from vmtasks.store.records import ImageRecord, MediaRecord, write_record
from vmtasks.store.store import Store

Spoil = Callable[[Path], object]


class Home:
    """A state folder, with the records that a project would write."""

    def __init__(self, store: Store, vm_dir: Path) -> None:
        self.store, self.vm_dir = store, vm_dir

    def name(self, record: ImageRecord, path: str = "tiny/phase-1.toml") -> Path:
        """Write a record that names an image."""
        with prune.naming(self.store, self.vm_dir):
            write_record(self.vm_dir / path, PhaseRecord(digest=record.digest, sha256=record.sha256))
        return self.vm_dir / path

    def machine(self, record: ImageRecord) -> Path:
        """Have a machine on an image; returns its record."""
        path = self.vm_dir / "run/box/machine.toml"
        with prune.naming(self.store, self.vm_dir):
            told = MachineRecord(
                name="box", guest="g", snapshot="clean", image=record.digest, image_sha256=record.sha256, ssh_user="",
                host_keys=[],
            )  # fmt: skip
            write_record(path, told)
            disk.overlay(path.with_name("disk.qcow2"), self.store.image(record))
        return path

    def installer(self, data: bytes = b"iso") -> Path:
        """Have an installer; returns where it is."""
        sha256 = hashlib.sha256(data).hexdigest()
        iso = self.store.download(sha256)
        iso.parent.mkdir(parents=True, exist_ok=True)
        iso.write_bytes(data)
        record = MediaRecord(
            sha256=sha256, size=len(data), mtime_ns=iso.stat().st_mtime_ns, origin="", recipe=sha256[::-1]
        )
        with prune.naming(self.store, self.vm_dir):
            write_record(self.store.root / "media" / f"{record.recipe}.toml", record)
            write_record(self.vm_dir / "tiny/installer.toml", record)
        return iso


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def home(store: Store, tmp_path: Path) -> Home:
    return Home(store, tmp_path / "project/.vm")


def test_what_no_record_names_goes_and_a_dry_run_only_says_so(store: Store, home: Home):
    home.name(make(store, "a"))
    iso = home.installer()
    other = home.installer(b"another")
    kept, extra = other, make(store, "x")
    before = sorted(path for path in store.root.rglob("*") if path.parent.name != "locks")
    dry = prune.prune(store, dry_run=True)
    assert set(dry.gone) == {*all_of(store, extra), iso}
    assert sorted(path for path in store.root.rglob("*") if path.parent.name != "locks") == before
    done = prune.prune(store)
    assert (set(done.gone), done.size, done.warnings) == (set(dry.gone), dry.size, [])
    assert not any(path.exists() for path in done.gone)
    assert kept.exists()
    assert prune.prune(store).gone == []


def test_a_project_that_is_not_there_keeps_what_it_named_last(store: Store, home: Home, tmp_path: Path):
    a = make(store, "a")
    b = make(store, "b", a)
    home.name(b)
    iso = home.installer()
    extra = make(store, "x")
    away = home.vm_dir.rename(tmp_path / "away")
    for _ in range(2):
        done = prune.prune(store)
        (warning,) = done.warnings
        assert f"{home.vm_dir} is not there; what it named last is kept" in warning
        assert f"vmtasks prune --forget {home.vm_dir}" in warning
    home.vm_dir.mkdir()
    assert prune.prune(store).warnings, "as a mount point is without its mount"
    assert not store.image(extra).exists()
    assert store.find("b")[1] == ""
    assert iso.exists()
    home.vm_dir.rmdir()
    away.rename(home.vm_dir)
    assert prune.prune(store).warnings == [], "it is there again"
    assert store.find("b")[1] == ""


def test_a_project_of_somebody_else_keeps_what_it_named_last(store: Store, home: Home):
    a = make(store, "a")
    home.name(a)
    prune.prune(store)
    os.chown(home.vm_dir, 65534, 65534)
    home.vm_dir.chmod(0o700)
    words = [sys.executable, "-m", "vmtasks.cli", "prune", "--dry-run"]
    env = {**os.environ, "VMTASKS_STORE": str(store.root), "HOME": str(store.root), "VM_DIR": ""}
    with process.spawn(words, env=env, cwd=store.root, pipe=True, merge=True, unprivileged=True) as child:
        said = child.communicate(timeout=60)[0].decode()
    assert child.returncode == 0, said
    assert f"{home.vm_dir} cannot be read; what it named last is kept" in said
    assert store.find("a")[1] == ""


@pytest.mark.parametrize("which", ["", ".vm"])
def test_a_project_that_is_gone_for_good_is_forgotten(store: Store, home: Home, which: str):
    record = make(store, "a")
    home.name(record)
    iso = home.installer()
    folder = home.vm_dir.parent / which
    with pytest.raises(ConfigError, match="is there, and what it names is kept"):
        prune.prune(store, forget=folder)
    shutil.rmtree(home.vm_dir.parent)
    with pytest.raises(ConfigError, match=f"those that are not there: {home.vm_dir}"):
        prune.prune(store, forget=folder.with_name("other"))
    gone = {*all_of(store, record), iso}
    assert set(prune.prune(store, forget=folder, dry_run=True).gone) == gone
    assert prune.prune(store).gone == []
    assert set(prune.prune(store, forget=folder).gone) == gone
    assert prune.prune(store).warnings == []


def test_a_project_that_was_moved_names_its_images_from_its_new_place(store: Store, home: Home, tmp_path: Path):
    record = make(store, "a")
    home.name(record)
    moved = home.vm_dir.rename(tmp_path / "moved")
    prune.register(store, moved)
    assert prune.prune(store, forget=home.vm_dir).gone == []
    assert store.find("a")[1] == ""


def test_an_entry_of_an_older_version_that_is_away_keeps_everything(store: Store, home: Home, tmp_path: Path):
    record = make(store, "a")
    old = store.root / "projects/0123456789abcdef"
    old.parent.mkdir(parents=True)
    old.write_text(f"{tmp_path}/unmounted/.vm\n")
    iso = home.installer()
    shutil.rmtree(home.vm_dir)
    fill(store, "x")
    done = prune.prune(store)
    assert done.gone == [store.partial("x")]
    assert any("no image and no installer is removed" in warning for warning in done.warnings)
    assert store.find("a")[1] == ""
    assert iso.exists()
    done = prune.prune(store, forget=tmp_path / "unmounted")
    assert set(done.gone) == set(all_of(store, record))


SPOILS: dict[str, Spoil] = {
    "nothing": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff\0garbage"),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "dangling": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
@pytest.mark.parametrize("path", ["tiny/phase-1.toml", "tiny/clean.toml", "tiny/snapshots/one.toml"])
def test_a_record_that_cannot_be_read_keeps_what_it_may_name(store: Store, home: Home, path: str, spoil: Spoil):
    a = make(store, "a")
    record = make(store, "b", a)
    home.name(make(store, "c"), "tiny/phase-2.toml")
    spoiled = home.name(record, path)
    spoil(spoiled)
    done = prune.prune(store)
    assert done.gone == []
    (warning,) = done.warnings
    assert warning.startswith(f"{spoiled} cannot be read; what it named last is kept")
    home.name(make(store, "d"), "tiny/phase-3.toml")
    assert prune.prune(store).gone == [], "not forgotten either when another record is written"
    spoiled.rmdir() if spoiled.is_dir() and not spoiled.is_symlink() else spoiled.unlink()
    prune.register(store, home.vm_dir)
    assert set(prune.prune(store).gone) == {*all_of(store, a), *all_of(store, record)}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_disk_keeps_what_it_stands_on_whatever_has_become_of_records(store: Store, home: Home, spoil: Spoil):
    a = real(store, "a")
    b = real(store, "b", a)
    machine = home.machine(b)
    anew = make(store, "b", a, b"anew")
    for entry in (store.root / "projects").iterdir():
        entry.unlink()
    spoil(machine)
    for record in (a, b):
        spoil(store.image(record).with_suffix(".toml"))
    key = store.snapshot_key(b.digest)
    key.parent.mkdir(parents=True)
    key.write_text("key")
    prune.register(store, home.vm_dir)
    done = prune.prune(store)
    assert done.gone == [], "what it names was never read: it may name any image"
    assert any(str(machine) in warning and "no image" in warning for warning in done.warnings)
    assert key.exists()
    named, unread = prune.names_of(home.vm_dir)
    assert unread == [machine]
    store.prune(store.reachable((), named.disks))
    assert store.image(a).exists()
    assert store.image(b).exists()
    assert disk.info(machine.with_name("disk.qcow2"))["full-backing-filename"] == str(store.image(b))
    assert not store.image(anew).exists()


def test_a_machine_keeps_its_image_when_that_is_built_anew(store: Store, home: Home):
    a = real(store, "a")
    home.name(a)
    home.machine(a)
    anew = make(store, "a", data=b"anew")
    home.name(anew)
    assert prune.prune(store).gone == []
    (home.vm_dir / "run/box/disk.qcow2").unlink()
    (home.vm_dir / "run/box/machine.toml").unlink()
    prune.register(store, home.vm_dir)
    assert set(prune.prune(store).gone) == set(all_of(store, a))


def test_results_are_no_records_of_images(store: Store, home: Home):
    home.name(make(store, "a"))
    for name in ("clean", "phase-1"):
        (home.vm_dir / "results").mkdir(exist_ok=True)
        (home.vm_dir / f"results/{name}.toml").write_text('suite = "clean"\n')
    assert prune.prune(store).warnings == []


# ---- at work just now


def test_an_image_without_a_record_in_any_project_yet_is_kept_while_its_maker_holds_the_lock(store: Store, home: Home):
    with store.lock("image-a", timeout_s=0):
        record = make(store, "a")
        assert prune.prune(store).gone == []
        home.name(record)
    assert prune.prune(store).gone == []


def test_an_installer_is_kept_while_somebody_fetches_it(store: Store, home: Home):
    iso = home.installer()
    (home.vm_dir / "tiny/installer.toml").unlink()
    prune.register(store, home.vm_dir)
    recipe = next((store.root / "media").iterdir()).stem
    with store.lock(f"media-{recipe[:32]}", timeout_s=0):
        assert prune.prune(store).gone == []
    assert iso.exists()
    assert prune.prune(store).gone == [iso]


PRUNE = """
    import sys
    from pathlib import Path
    from vmtasks.host import progress
    from vmtasks.images import prune as tidy
    from vmtasks.store.store import Store
    progress.talk()
    print("goes", flush=True)
    print(*tidy.prune(Store(Path(sys.argv[1]))).gone, flush=True)
"""


def test_nothing_is_pruned_between_finding_an_image_and_naming_it(store: Store, home: Home):
    record = make(store, "a")
    naming = prune.naming(store, home.vm_dir)
    naming.__enter__()
    argv = [sys.executable, "-c", textwrap.dedent(PRUNE), str(store.root)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as pruning:
        assert pruning.stdout.readline() == "goes\n"
        assert "waiting" in pruning.stdout.readline()
        assert store.find("a") == (record, "")
        write_record(home.vm_dir / "tiny/phase-1.toml", PhaseRecord(digest="a", sha256=record.sha256))
        naming.__exit__(None, None, None)
        assert pruning.stdout.readline() == "\n", "nothing is gone"
    assert store.find("a") == (record, "")


def test_below_an_image_that_is_being_made_nothing_goes(store: Store):
    a = real(store, "a")
    disk.overlay(store.partial("b"), store.image(a), relative=True)
    with store.lock("image-b", timeout_s=0):
        assert prune.prune(store).gone == []
    disk.check(store.partial("b"))
    publish(store, "b", a)


def test_names_are_written_whole(store: Store, home: Home):
    home.name(make(store, "a"))
    (entry,) = (store.root / "projects").iterdir()
    entry.write_text("garbage")
    done = prune.prune(store)
    assert done.gone == []
    assert str(entry) in done.warnings[0]
    prune.register(store, home.vm_dir)
    assert prune.prune(store).warnings == []
    assert msgspec.to_builtins(prune.names_of(home.vm_dir)[0])["vm_dir"] == str(home.vm_dir)


# ---- on the command line


def vmtasks(home: Home, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, outside a project, with the state folder of `home`."""
    env = {
        "HOME": str(home.store.root.parent), "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(cli.__file__).parents[2]),
        "VMTASKS_STORE": str(home.store.root), "VM_DIR": str(home.vm_dir),
    }  # fmt: skip
    return run_command_line(*words, cwd=home.store.root.parent, env=env)


def test_prune_on_the_command_line(store: Store, home: Home, tmp_path: Path):
    away = Home(store, tmp_path / "away/.vm")
    kept, extra = make(store, "a"), make(store, "x")
    away.name(make(store, "b"))
    shutil.rmtree(away.vm_dir)
    (home.vm_dir / "tiny").mkdir(parents=True)
    write_record(home.vm_dir / "tiny/phase-1.toml", PhaseRecord(digest="a", sha256=kept.sha256))
    dry = vmtasks(home, "prune", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert set(dry.stdout.splitlines()) == {f"would remove {path}" for path in all_of(store, extra)}
    assert f"warning: {away.vm_dir} is not there" in dry.stderr
    assert "2 would be removed, 0 MiB" in dry.stderr
    assert store.find("x")[1] == ""
    done = vmtasks(home, "prune")
    assert set(done.stdout.splitlines()) == {f"removed {path}" for path in all_of(store, extra)}
    assert store.find("a")[1] == "", "the folder that we are in names it, although it has never told the store"
    wrong = vmtasks(home, "prune", "--forget", str(tmp_path / "nowhere"))
    assert (wrong.returncode, str(away.vm_dir) in wrong.stderr) == (2, True)
    assert "2 removed" in vmtasks(home, "prune", "--forget", str(away.vm_dir)).stderr


def test_doctor_reads_every_byte_of_the_store(store: Store, home: Home):
    whole, damaged = make(store, "a"), make(store, "b", None, bytes(1 << 20))
    home.installer()
    assert vmtasks(home, "doctor", "--store").returncode == 0
    path = store.image(damaged)
    damage(path, 500_000, b"x")
    assert store.find("b")[1] == ""
    done = vmtasks(home, "doctor", "--store")
    assert done.returncode == 1
    assert f"✗ image b, g b: {path.name} does not have the bytes that its record says; doit auto_install" in done.stdout
    assert "✓ image a, g a" in done.stdout
    assert store.find("b") == (None, "the image was damaged")
    assert store.find("a") == (whole, "")
    path.write_bytes(bytes(1 << 20))
    assert "its bytes are right again" in vmtasks(home, "doctor", "--store").stdout
    assert store.find("b") == (damaged, "")
    assert vmtasks(home, "doctor", "--store", "box").returncode == 2


def test_folders_that_are_made_are_for_nobody_else(tmp_path: Path):
    store, state = Store(tmp_path / "cache/store"), tmp_path / "project/.vm"
    prune.register(store, state)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (store.root, state)] == [0o700, 0o700]
    store.root.chmod(0o750)
    prune.register(store, state)
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o750, "one that is there is its owner's to open"
