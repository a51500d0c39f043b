"""A store that was interrupted, filled up, tampered with or used by two at once."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmtasks import atomic, leftovers, tidy
from vmtasks.errors import BusyError, StateError
from vmtasks.lock import lock
from vmtasks.store import ImageRecord, Store, read_record, write_record


def fill(store: Store, digest: str, data: bytes = b"disk") -> None:
    store.partial(digest).parent.mkdir(parents=True, exist_ok=True)
    store.partial(digest).write_bytes(data)


def publish(store: Store, digest: str, below: ImageRecord | None = None) -> ImageRecord:
    def record(stat: os.stat_result, sha256: str) -> ImageRecord:
        return ImageRecord(
            digest=digest,
            guest="g",
            version="",
            name=digest,
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            sha256=sha256,
            virtual_size=1,
            backing=below.digest if below else "",
            backing_sha256=below.chain if below else "",
            created=time.time(),
        )

    return store.publish(digest, record)


def make(store: Store, digest: str, below: ImageRecord | None = None, data: bytes = b"disk") -> ImageRecord:
    fill(store, digest, data)
    return publish(store, digest, below)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_what_is_published_is_found_and_cannot_be_written(store: Store):
    assert store.find("a") == (None, "not built yet")
    record = make(store, "a", data=b"abc")
    assert store.find("a") == (record, "")
    assert store.find("a", full=True) == (record, "")
    assert store.image("a").stat().st_mode & 0o777 == 0o444
    assert not store.partial("a").exists()
    assert (record.size, record.sha256[:8]) == (3, "ba7816bf")


# ---- interrupted


def die_at(call: int) -> None:
    """Have this process killed before so many-th of its calls."""
    calls = iter(range(1, call))

    def count(event: str, _args: object) -> None:
        if event != "os.kill" and next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def test_killed_at_any_moment_of_publishing_there_is_all_or_nothing(tmp_path: Path):
    """A child is killed before its 1st, 2nd, ... call to the system that Python reports, until it gets through."""
    for moment in range(1, 100):
        store = Store(tmp_path / str(moment))
        fill(store, "a")
        pid = os.fork()
        if not pid:
            die_at(moment)
            publish(store, "a")
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        found, why = store.find("a", full=True)
        if status == 0:
            assert found is not None
            assert moment > 8, "the test did not see the calls that it means to interrupt"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert found is not None or why == "not built yet"
        store.drop("a")
        assert make(store, "a") == store.find("a", full=True)[0], f"not to be mended after moment {moment}"
    raise AssertionError("publishing never ended")


def test_a_full_disk_is_said_and_nothing_is_believed(full_disk: Path):
    store = Store(full_disk)
    fill(store, "a")
    with pytest.raises(OSError, match="No space"):
        (full_disk / "ballast").write_bytes(b"x" * (1 << 20))
    with pytest.raises(OSError, match="No space") as caught:
        publish(store, "a")
    assert caught.value.errno == errno.ENOSPC
    assert store.find("a") == (None, "not built yet")
    assert sorted(p.name for p in (full_disk / "images").iterdir()) == ["a.qcow2"]
    # What ends a machine must be able to take a lock, now above all.
    with store.lock("a", timeout_s=1), pytest.raises(BusyError, match="another process"), store.lock("a", timeout_s=0):
        pass
    (full_disk / "ballast").unlink()
    store.drop("a")
    assert make(store, "a") == store.find("a")[0]


def test_a_write_that_fails_leaves_the_old_content(full_disk: Path):
    path = full_disk / "file"
    atomic.write(path, "old")
    with pytest.raises(OSError, match="No space"):
        atomic.write(path, "x" * 100_000)
    assert path.read_text() == "old"
    assert list(full_disk.iterdir()) == [path]


# ---- not to be believed


def test_truncated_by_one_byte(store: Store):
    make(store, "a", data=b"abc")
    store.image("a").chmod(0o644)
    os.truncate(store.image("a"), 2)
    assert store.find("a") == (None, "a.qcow2 has 2 bytes, its record says 3")


def test_changed_in_place(store: Store):
    record = make(store, "a", data=b"abc")
    store.image("a").chmod(0o644)
    store.image("a").write_bytes(b"abd")
    os.utime(store.image("a"), ns=(0, record.mtime_ns + 1))
    assert store.find("a") == (None, "a.qcow2 was changed since it was published")
    os.utime(store.image("a"), ns=(0, record.mtime_ns))
    assert store.find("a", full=True) == (None, "a.qcow2 does not have the SHA-256 that its record says")


def test_touched_only(store: Store):
    record = make(store, "a")
    store.image("a").touch()
    assert store.find("a")[0] is None
    assert store.find("a", full=True)[0] == record, "every byte is right"


@pytest.mark.parametrize("text", ["", "digest = 1", "not toml", "\0", 'digest = "a"\n', "\N{BOM}"])
def test_a_damaged_record_is_none(text: str, store: Store):
    make(store, "a")
    (store.root / "images/a.toml").write_text(text)
    assert store.record("a") is None
    assert store.find("a") == (None, "not built yet")
    assert store.records() == []


def test_a_record_of_bytes_that_are_no_text_is_none(store: Store):
    make(store, "a")
    (store.root / "images/a.toml").write_bytes(b"\xff")
    assert store.record("a") is None


def test_an_image_stands_on_those_below_it(store: Store):
    a = make(store, "a", data=b"1")
    b = make(store, "b", a)
    c = make(store, "c", b)
    assert store.find("c") == (c, "")
    store.drop("a")
    assert store.find("c") == (None, "the image below it, a, is gone")
    make(store, "a", data=b"2")
    assert store.find("c") == (None, "the image below it, a, was built anew")
    assert store.find("b") == (None, "the image below it, a, was built anew")
    make(store, "b", store.find("a")[0])
    assert store.find("b")[1] == ""
    assert store.find("c") == (None, "the image below it, b, was built anew"), "although b's own bytes are the same"


def test_the_same_bytes_built_again_are_as_good(store: Store):
    a = make(store, "a", data=b"1")
    c = make(store, "c", a)
    store.drop("a")
    make(store, "a", data=b"1")
    assert store.find("c") == (c, "")


def test_a_damaged_image_below_is_named(store: Store):
    c = make(store, "c", make(store, "b", make(store, "a")))
    store.image("a").chmod(0o644)
    os.truncate(store.image("a"), 1)
    assert store.find("c") == (None, "a.qcow2 has 1 bytes, its record says 4")
    assert store.fault(c) == store.find("c")[1]


def test_a_moved_store_is_the_same(store: Store, tmp_path: Path):
    record = make(store, "a")
    moved = store.root.rename(tmp_path / "elsewhere")
    assert Store(moved).find("a", full=True) == (record, "")


def test_failed_disks_are_kept_apart(store: Store):
    fill(store, "a", b"broken")
    assert store.keep_failed("a").read_bytes() == b"broken"
    assert store.find("a") == (None, "not built yet")
    fill(store, "a", b"again")
    assert store.keep_failed("a").read_bytes() == b"again"


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@given(TEXT, st.lists(TEXT, max_size=3), st.integers(0, 1 << 62), st.floats(0, 1e12))
def test_records_come_back(
    tmp_path_factory: pytest.TempPathFactory, text: str, keys: list[str], number: int, when: float
):
    path = tmp_path_factory.getbasetemp() / "record.toml"
    record = ImageRecord(
        digest=text, guest=text, version=text, name=text, size=number, mtime_ns=number, sha256="",
        virtual_size=1, host_keys=keys, created=when,
    )  # fmt: skip
    write_record(path, record)
    assert read_record(path, ImageRecord) == record


# ---- pruned


def test_prune_keeps_what_is_named_and_all_below(store: Store):
    a = make(store, "a")
    b = make(store, "b", a)
    make(store, "c", b)
    make(store, "x", a)
    fill(store, "b")
    fill(store, "gone")
    store.keep_failed("gone")
    gone = store.prune(["b"])
    assert sorted(p.name for p in gone) == ["b.partial", "c.qcow2", "c.toml", "gone.qcow2", "x.qcow2", "x.toml"]
    assert store.find("b", full=True) == (b, "")
    assert sorted(p.name for p in (store.root / "images").iterdir()) == ["a.qcow2", "a.toml", "b.qcow2", "b.toml"]
    assert store.prune(["b"]) == []
    assert len(store.prune([])) == 4
    assert store.records() == []


def test_prune_leaves_alone_what_is_being_made(store: Store):
    fill(store, "a")
    with store.lock("image-a", timeout_s=0):
        assert store.prune([]) == []
    assert store.prune(["a"]) == [store.partial("a")]


def test_prune_of_nothing(store: Store):
    assert store.prune(["a"]) == []


# ---- what killed processes leave

WRITER = """
    import sys
    from pathlib import Path
    from vmtasks import atomic
    with atomic.temporary(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as beside:
        (beside / "part" if beside.is_dir() else beside).write_bytes(b"half of it")
        print(beside, flush=True)
        sys.stdin.readline()
        beside.rename(sys.argv[1])
"""
DIGEST = "0123456789abcdef" * 4


def writer(path: Path, kind: str) -> tuple[subprocess.Popen[str], Path]:
    """A process that is writing `path` until it gets a line, and what it writes to."""
    argv = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), kind]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("where", [f"images/{DIGEST}.toml", f"packages/unpacked/{DIGEST}", "keys/" + "é" * 120])
def test_what_is_being_written_stays_and_what_a_killed_writer_left_goes(store: Store, kind: str, where: str):
    path = store.root / where
    process, beside = writer(path, kind)
    with process:
        assert beside.exists()
        assert tidy.prune(store) == ([], 0)
        process.communicate("go on\n", timeout=20)
    assert process.returncode == 0
    assert path.exists()
    atomic.remove(path)
    process, beside = writer(path.with_name("other"), kind)
    process.kill()
    process.communicate()
    assert beside.exists()
    assert list(leftovers.sweep(store.root, dry_run=True)) == [(beside, len("half of it"))]
    assert tidy.prune(store) == ([beside], len("half of it"))
    assert not beside.exists()


def test_what_former_versions_left_goes_after_a_day(store: Store):
    """They held no lock on what they were writing, and cut its name."""
    images, packages = store.root / "images", store.root / "packages"
    old = [images / f".{DIGEST[:60]}.ab_cd3f9", packages / "debs/.fetch-k3j4x_9a", packages / "unpacked/.new-k3j4x_9a"]
    for path in old[1:]:
        path.mkdir(parents=True)
        (path / "file").touch()
    images.mkdir()
    old[0].touch()
    assert tidy.prune(store) == ([], 0)
    for path in old:
        os.utime(path, (time.time() - 86401,) * 2)
    assert sorted(tidy.prune(store)[0]) == sorted(old)


def test_locks_that_nobody_holds_go(store: Store):
    with store.lock("image-a", timeout_s=0), lock(store.root / "downloads/x.lock", "x", timeout_s=0):
        pass
    (store.root / "downloads/x.unpacked").write_bytes(b"12345")
    with store.lock("image-b", timeout_s=0):
        assert tidy.prune(store) == ([store.root / "downloads/x.unpacked"], 5)
        assert sorted(path.name for path in (store.root / "locks").iterdir()) == ["image-b.lock", "image-b.owner"]
    tidy.prune(store)
    assert [*(store.root / "locks").iterdir(), *(store.root / "downloads").iterdir()] == []
    with store.lock("image-b", timeout_s=0):
        pass


# ---- two at once

HOLDER = """
    import sys, time
    from pathlib import Path
    from vmtasks.store import Store
    waiting = lambda who: print("waits", who, flush=True)
    with Store(Path(sys.argv[1])).lock("image", timeout_s=float(sys.argv[2]), waiting=waiting):
        print("has it", flush=True)
        sys.stdin.readline()
"""


def holder(store: Store, timeout_s: float = 20.0) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", textwrap.dedent(HOLDER), str(store.root), str(timeout_s)]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_second_waits_and_is_told_who_holds_the_lock(store: Store):
    with holder(store) as first:
        assert first.stdout.readline() == "has it\n"
        with holder(store) as second:
            assert second.stdout.readline() == f"waits process {first.pid}\n"
            first.stdin.write("\n")
            first.stdin.close()
            assert second.stdout.readline() == "has it\n"
            second.stdin.write("\n")
    assert (first.returncode, second.returncode) == (0, 0)


def test_the_second_gives_up_at_its_deadline(store: Store):
    told = []
    with holder(store) as first:
        assert first.stdout.readline() == "has it\n"
        with (
            pytest.raises(
                StateError, match=rf"^image is locked by process {first.pid}, and was for 0.3 s\n(?s:.*)\.lock$"
            ),
            store.lock("image", timeout_s=0.3, waiting=told.append),
        ):
            pass
        assert told == [f"process {first.pid}"]
        first.kill()


def test_the_lock_of_a_killed_process_is_free(store: Store):
    with holder(store) as first:
        assert first.stdout.readline() == "has it\n"
        first.kill()
        first.wait()
        with store.lock("image", timeout_s=0):
            pass


def test_a_child_that_inherited_the_lock_holds_it_after_its_parent_was_killed(store: Store):
    """So that nobody else writes an image that an orphaned QEMU still has open."""
    pid = os.fork()
    if not pid:
        with store.lock("image", timeout_s=0) as handle:
            child = subprocess.Popen(["sleep", "60"], pass_fds=[handle])
            (store.root / "pid").write_text(str(child.pid))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    sleeper = int((store.root / "pid").read_text())
    with pytest.raises(StateError), store.lock("image", timeout_s=0):
        pass
    os.kill(sleeper, signal.SIGKILL)
    with store.lock("image", timeout_s=5):
        pass


def test_a_lock_can_be_taken_again_and_others_are_free(store: Store):
    for _ in range(3):
        with store.lock("image", timeout_s=0), store.lock("other", timeout_s=0):
            pass


def test_one_process_does_not_take_a_lock_twice(store: Store):
    with store.lock("image", timeout_s=0), pytest.raises(StateError), store.lock("image", timeout_s=0):
        pass


def test_the_lock_is_free_after_an_error(store: Store):
    with pytest.raises(ValueError, match="x"), store.lock("image", timeout_s=0):
        raise ValueError("x")
    with store.lock("image", timeout_s=0):
        pass


# ---- whole or absent


def test_write_if_changed(tmp_path: Path):
    path = tmp_path / "new/file"
    assert atomic.write_if_changed(path, "text", 0o555)
    before = path.stat()
    assert not atomic.write_if_changed(path, b"text", 0o555)
    assert path.stat() == before
    assert atomic.write_if_changed(path, "text", 0o444)
    assert path.stat().st_mode & 0o777 == 0o444
    assert atomic.write_if_changed(path, "text2", 0o444)
    assert path.read_text() == "text2"


def test_replacing_cleans_up_after_an_error(tmp_path: Path):
    def fail() -> None:
        with atomic.replacing(tmp_path / "file") as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
