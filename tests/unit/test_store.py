"""A store that was interrupted, filled up, tampered with or used by two at once."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmtasks.errors import BusyError, ImageError, StateError
from vmtasks.host import files
from vmtasks.host.locks import lock
from vmtasks.images import prune
from vmtasks.media import disk
from vmtasks.store import leftovers, qcow2
from vmtasks.store.records import ImageRecord, read_record, write_record
from vmtasks.store.store import Store


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


def damage(path: Path, at: int, data: bytes = b"damage") -> None:
    """Change bytes of an image; its size and time stay."""
    times = path.stat()
    path.chmod(0o644)
    with path.open("rb+") as file:
        file.seek(at)
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_what_is_published_is_found_and_cannot_be_written(store: Store):
    assert store.find("a") == (None, "not built yet")
    record = make(store, "a", data=b"abc")
    assert store.find("a") == (record, "")
    assert store.find("a", look="bytes") == (record, "")
    assert store.image(record).stat().st_mode & 0o777 == 0o444
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
        found, why = store.find("a", look="bytes")
        if status == 0:
            assert found is not None
            assert moment > 8, "the test did not see the calls that it means to interrupt"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert found is not None or why == "not built yet"
        assert make(store, "a") == store.find("a", look="bytes")[0], f"not to be mended after moment {moment}"
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
    assert [p.suffix for p in (full_disk / "images").iterdir()] == [".qcow2"]
    # What ends a machine must be able to take a lock, now above all.
    with store.lock("a", timeout_s=1), pytest.raises(BusyError, match="another process"), store.lock("a", timeout_s=0):
        pass
    (full_disk / "ballast").unlink()
    assert make(store, "a") == store.find("a")[0]


def test_a_write_that_fails_leaves_the_old_content(full_disk: Path):
    path = full_disk / "file"
    files.write(path, "old")
    with pytest.raises(OSError, match=f"No space.*{path}"):
        files.write(path, "x" * 100_000)
    assert path.read_text() == "old"
    assert list(full_disk.iterdir()) == [path]


# ---- not to be believed


def test_truncated_by_one_byte(store: Store):
    path = store.image(make(store, "a", data=b"abc"))
    path.chmod(0o644)
    os.truncate(path, 2)
    assert store.find("a") == (None, f"{path.name} has 2 bytes, its record says 3")


def test_changed_in_place(store: Store):
    path = store.image(make(store, "a", data=b"abc"))
    path.chmod(0o644)
    path.write_bytes(b"abd")
    assert store.find("a") == (None, f"{path.name} does not have the bytes that its record says")
    assert store.find("a") == (None, "the image was damaged"), "and it is not believed again"
    assert path.exists(), "overlays may stand on it"
    assert store.mend() == []
    path.write_bytes(b"abc")
    assert store.mend() == [path.stem]
    assert store.find("a")[1] == ""


def test_other_bytes_of_the_same_time(store: Store):
    """As a fault of the file system leaves it, or a copy with times of a file that was damaged before."""
    record = make(store, "a", data=bytes(1 << 20))
    path = store.image(record)
    damage(path, 300_001, b"x")
    assert store.find("a") == (record, "")
    assert store.find("a", look="bytes") == (None, f"{path.name} does not have the bytes that its record says")


def test_a_store_that_was_copied_is_as_good_and_is_read_once(store: Store, tmp_path: Path):
    """As a cache of CI gives it back: times are of the copy, and archives keep whole seconds only."""
    below = make(store, "a")
    record = make(store, "b", below)
    copy = Store(Path(shutil.copytree(store.root, tmp_path / "copy", copy_function=shutil.copyfile)))
    assert copy.image(record).stat().st_mtime_ns != record.mtime_ns
    assert copy.find("b") == (record, "")
    for image in (below, record):
        assert copy.image(image).stat().st_mtime_ns == image.mtime_ns, "stamped, so that it is not read again"
    copy.image(record).chmod(0o644)
    copy.image(record).write_bytes(b"dusk")
    os.utime(copy.image(record), ns=(0, record.mtime_ns // 10**9 * 10**9))
    assert copy.find("b") == (record, ""), "a time in whole seconds is the same time: nothing is read"


@pytest.mark.parametrize("text", ["", "digest = 1", "not toml", "\0", 'digest = "a"\n', "\N{BOM}"])
def test_a_damaged_record_is_none(text: str, store: Store):
    store.image(make(store, "a")).with_suffix(".toml").write_text(text)
    assert store.made("a") == []
    assert store.find("a") == (None, "not built yet")
    assert store.records() == []


def test_a_record_of_bytes_that_are_no_text_is_none(store: Store):
    record = make(store, "a")
    store.image(record).with_suffix(".toml").write_bytes(b"\xff")
    assert store.made("a") == []
    assert store.record("a", record.sha256) is None


def old(store: Store, digest: str, below: ImageRecord | None = None, data: bytes = b"disk") -> ImageRecord:
    """An image as older versions published it."""
    made = make(store, digest, below, data)
    as_it_was = msgspec.structs.replace(made, file="", sample="")
    store.image(made).with_suffix(".toml").unlink()
    store.image(made).rename(store.image(as_it_was))
    write_record(store.image(as_it_was).with_suffix(".toml"), as_it_was)
    assert sorted(p.name for p in (store.root / "images").glob(f"{digest}.*")) == [f"{digest}.qcow2", f"{digest}.toml"]
    return as_it_was


def drop(store: Store, record: ImageRecord) -> None:
    for path in all_of(store, record):
        path.unlink()


def all_of(store: Store, record: ImageRecord) -> tuple[Path, Path]:
    return store.image(record), store.image(record).with_suffix(".toml")


@pytest.mark.parametrize("first", [make, old])
def test_an_image_stands_on_those_below_it(store: Store, first: Callable[..., ImageRecord]):
    a = first(store, "a", None, b"1")
    b = first(store, "b", a)
    c = first(store, "c", b)
    assert store.find("c") == (c, "")
    again = make(store, "a", data=b"2")
    assert store.find("c") == (c, ""), "what it stands on is as it was"
    assert store.image(a).read_bytes() == b"1"
    drop(store, a)
    assert store.find("c") == (None, "the image below it, a, was rebuilt")
    drop(store, again)
    assert store.find("c") == (None, "the image below it, a, is gone")


@pytest.mark.parametrize("first", [make, old])
def test_an_image_that_is_built_anew_is_another_and_each_keeps_to_its_own(
    store: Store, first: Callable[..., ImageRecord]
):
    a = first(store, "a", None, b"1")
    b = first(store, "b", a)
    anew = make(store, "a", data=b"2")
    assert store.find("a") == (anew, ""), "who asks for the digest gets the newest"
    assert store.find("a", a.sha256) == (a, ""), "who has had one keeps it"
    assert store.find("b", chain=a.chain) == (b, "")
    assert store.find("b", chain=anew.chain) == (None, "the image below it was rebuilt")
    upon = make(store, "b", anew, b"other")
    assert store.find("b", chain=anew.chain) == (upon, "")
    assert store.find("b", chain=a.chain) == (b, "")


def test_the_same_bytes_built_again_are_as_good(store: Store):
    a = make(store, "a", data=b"1")
    c = make(store, "c", a)
    drop(store, a)
    make(store, "a", data=b"1")
    assert store.find("c") == (c, "")


def test_an_older_image_that_is_intact_serves_where_the_newest_is_not(store: Store):
    intact = make(store, "a", data=b"1")
    cut = store.image(make(store, "a", data=b"33"))
    cut.chmod(0o644)
    os.truncate(cut, 1)
    assert store.find("a") == (intact, "")


def test_a_damaged_image_below_is_named(store: Store):
    a = make(store, "a")
    c = make(store, "c", make(store, "b", a))
    store.image(a).chmod(0o644)
    os.truncate(store.image(a), 1)
    assert store.find("c") == (None, f"{store.image(a).name} has 1 bytes, its record says 4")
    assert store.fault(c) == store.find("c")[1]


def test_a_moved_store_is_the_same(store: Store, tmp_path: Path):
    record = make(store, "a")
    moved = store.root.rename(tmp_path / "elsewhere")
    assert Store(moved).find("a", look="bytes") == (record, "")


# ---- samples, of real images


def real(store: Store, digest: str, below: ImageRecord | None = None) -> ImageRecord:
    """An image that qemu-img has made, of 8 MiB or so."""
    if below is None:
        disk.create(store.partial(digest), 8 << 20)
    else:
        disk.overlay(store.partial(digest), store.image(below), relative=True)
    script = ["qemu-io", "-f", "qcow2", "-c", f"write -P {len(digest)} 0 8M", store.partial(digest)]
    subprocess.run(script, check=True, capture_output=True)
    record = publish(store, digest, below)
    path = store.image(record).with_suffix(".toml")
    record = msgspec.structs.replace(record, virtual_size=8 << 20)
    write_record(path, record)
    return record


def test_a_sound_chain_passes_every_look(store: Store):
    b = real(store, "b", real(store, "a"))
    assert store.image(b).stat().st_size > 8 << 20
    for look in ("time", "sample", "bytes"):
        assert store.find("b", look=look) == (b, "")


@pytest.mark.parametrize(
    ("at", "data"),
    [(0, b"garbage"), (24, b"\1"), (60_000, b"x"), (-1, b"x"), (0, bytes(9 << 20))],
    ids=["magic", "size", "tables", "end", "zeroes"],
)
def test_a_sample_sees_that_an_image_has_other_bytes(store: Store, at: int, data: bytes):
    a = real(store, "a")
    b = real(store, "b", a)
    size = store.image(a).stat().st_size
    damage(store.image(a), at % size, data[: size - at % size])
    assert store.find("b") == (b, ""), "its time is right"
    assert store.find("b", look="sample") == (
        None,
        f"{store.image(a).name} does not have the bytes that its record says",
    )
    assert store.find("a") == (None, "the image was damaged")


def test_an_image_of_an_older_version_is_known_by_its_header(store: Store):
    made = real(store, "a")
    as_it_was = msgspec.structs.replace(made, sample="")
    write_record(store.image(made).with_suffix(".toml"), as_it_was)
    assert store.find("a", look="sample") == (as_it_was, "")
    damage(store.image(made), 0, b"garbage")
    assert store.find("a", look="sample")[0] is None


def test_a_sample_of_a_large_image_reads_little(store: Store):
    """The same bytes for a gigabyte as for a megabyte, by count of what the kernel read for us."""
    counts = []
    for size in (1 << 20, 1 << 30):
        path = store.root.with_name(f"{size}.img")
        with path.open("wb") as data:
            data.truncate(size)
        before = rchar()
        qcow2.sample(path)
        counts.append(rchar() - before)
    assert max(counts) < 300 << 10


def rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_where_qemu_img_fails_all_bytes_are_read(store: Store):
    a = real(store, "a")
    b = real(store, "b", a)
    damage(store.image(a), 3_000_003, b"x")
    assert store.find("b", look="sample") == (b, ""), "a place that no sample hits"
    with (
        pytest.raises(ImageError, match=f"{store.image(a).name} does not have") as caught,
        store.explaining(b, "do it"),
    ):
        raise ImageError("qemu-img create: what it says")
    assert (caught.value.hint, str(caught.value.__cause__)) == ("do it", "qemu-img create: what it says")
    with pytest.raises(ImageError, match="what it says"), store.explaining(real(store, "c"), "do it"):
        raise ImageError("qemu-img create: what it says")


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


def prune_but(store: Store, *needed: ImageRecord) -> list[Path]:
    """Prune all that is not named by digest and SHA-256."""
    return store.prune(store.reachable({(record.digest, record.sha256) for record in needed}, ()))


@pytest.mark.parametrize("first", [make, old])
def test_prune_keeps_what_is_named_and_all_below(store: Store, first: Callable[..., ImageRecord]):
    a = first(store, "a")
    b = first(store, "b", a)
    named = {*all_of(store, a), *all_of(store, b)}
    anew = make(store, "b", a, b"anew")
    c = make(store, "c", b)
    x = make(store, "x", a)
    fill(store, "b")
    fill(store, "gone")
    store.keep_failed("gone")
    expected = {*all_of(store, anew), *all_of(store, c), *all_of(store, x), store.partial("b"), store.failed("gone")}
    assert set(store.prune(store.reachable({("b", b.sha256)}, ()), dry_run=True)) == expected
    assert all(path.exists() for path in expected)
    assert set(prune_but(store, b)) == expected
    assert store.find("b", look="bytes") == (b, "")
    assert set((store.root / "images").iterdir()) == named
    assert prune_but(store, b) == []
    assert store.prune(None) == [], "where nobody knows what is needed, all is"
    assert set(prune_but(store)) == named
    assert store.records() == []


def test_prune_goes_by_the_headers_where_a_record_cannot_be_read(store: Store):
    a = real(store, "a")
    b = real(store, "b", a)
    for record in (a, b):
        store.image(record).with_suffix(".toml").write_text("garbage")
    assert prune_but(store, b) == []
    assert store.prune(store.reachable((), {b.stem})) == [], "as an overlay names it"
    assert set(prune_but(store)) == {*all_of(store, a), *all_of(store, b)}


def test_prune_leaves_alone_what_is_being_made(store: Store):
    fill(store, "a")
    with store.lock("image-a", timeout_s=0):
        assert store.prune(set()) == []
    assert store.prune({"a"}) == [store.partial("a")]


def test_prune_of_nothing(store: Store):
    assert store.prune(store.reachable({("a", "")}, {"b"})) == []


# ---- what killed processes leave

WRITER = """
    import sys
    from pathlib import Path
    from vmtasks.host import files as atomic
    with atomic.temporary(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as beside:
        (beside / "part" if beside.is_dir() else beside).write_bytes(b"half of it")
        print(beside, flush=True)
        sys.stdin.readline()
        beside.rename(sys.argv[1])
"""
DIGEST = "0123456789abcdef" * 4


def swept(store: Store) -> tuple[list[Path], int]:
    """What prune removes, and its bytes."""
    pruned = prune.prune(store)
    return pruned.gone, pruned.size


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
        assert swept(store) == ([], 0)
        process.communicate("go on\n", timeout=20)
    assert process.returncode == 0
    assert path.exists()
    files.remove(path)
    process, beside = writer(path.with_name("other"), kind)
    process.kill()
    process.communicate()
    assert beside.exists()
    assert list(leftovers.sweep(store.root, dry_run=True)) == [(beside, len("half of it"))]
    assert swept(store) == ([beside], len("half of it"))
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
    assert swept(store) == ([], 0)
    for path in old:
        os.utime(path, (time.time() - 86401,) * 2)
    assert sorted(swept(store)[0]) == sorted(old)


def test_locks_that_nobody_holds_go(store: Store):
    with store.lock("image-a", timeout_s=0), lock(store.root / "downloads/x.lock", "x", timeout_s=0):
        pass
    (store.root / "downloads/x.unpacked").write_bytes(b"12345")
    with store.lock("image-b", timeout_s=0):
        assert swept(store) == ([store.root / "downloads/x.unpacked"], 5)
        assert sorted(path.name for path in (store.root / "locks").iterdir()) == ["image-b.lock", "image-b.owner"]
    prune.prune(store)
    assert [*(store.root / "locks").iterdir(), *(store.root / "downloads").iterdir()] == []
    with store.lock("image-b", timeout_s=0):
        pass


# ---- two at once

HOLDER = """
    import sys, time
    from pathlib import Path
    from vmtasks.store.store import Store
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


@pytest.mark.parametrize("spoil", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo, Path.mkdir, Path.touch])
def test_what_is_no_file_is_no_record(tmp_path: Path, spoil: Callable[[Path], object]):
    """Reading a device or a pipe may never end, and take all memory on the way."""
    spoil(tmp_path / "record.toml")
    assert read_record(tmp_path / "record.toml", ImageRecord) is None


def test_no_record_is_as_large_as_that(tmp_path: Path):
    with (tmp_path / "record.toml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="File too large"):
        files.read(tmp_path / "record.toml")


def test_a_file_of_any_size_has_a_digest(tmp_path: Path):
    """Packages on a phase's CD are larger than any record."""
    size = files.RECORD_BYTES + 1
    with (tmp_path / "package.deb").open("wb") as file:
        file.truncate(size)
    whole = subprocess.run(["sha256sum", tmp_path / "package.deb"], capture_output=True, text=True, check=True).stdout
    assert files.sha256(tmp_path / "package.deb") == whole.split()[0]


def test_write_if_changed(tmp_path: Path):
    path = tmp_path / "new/file"
    assert files.write_if_changed(path, "text", 0o555)
    before = path.stat()
    assert not files.write_if_changed(path, b"text", 0o555)
    assert path.stat() == before
    assert files.write_if_changed(path, "text", 0o444)
    assert path.stat().st_mode & 0o777 == 0o444
    assert files.write_if_changed(path, "text2", 0o444)
    assert path.read_text() == "text2"


def test_replacing_cleans_up_after_an_error(tmp_path: Path):
    def fail() -> None:
        with files.replacing(tmp_path / "file") as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
