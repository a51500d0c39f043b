"""What comes out of a guest: plain files and folders, in bounds; from one that lies, nothing that was not asked for."""

import io
import os
import shutil
import socket
import stat
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from shellserver import serving

from vmtasks.guest import artifacts, connect
from vmtasks.guest.artifacts import Fetched, fetch
from vmtasks.guest.client import Connection

MIB = 1 << 20
OUTSIDE = "secret of this host\n"


@pytest.fixture
def local_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    """Programs in `tmp_path/bin` come before this host's."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with serving(tmp_path / "home") as target, connect.connect(target, timeout_s=20) as connection:
        yield connection


@pytest.fixture
def cwd(local_guest: Connection, tmp_path: Path) -> Path:  # noqa: ARG001 - its home is there
    """The suite's folder in the guest, which is this host: whatever comes out wrongly would be seen."""
    folder = tmp_path / "home" / "src"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text(OUTSIDE)
    return folder


def get(connection: Connection, dest: Path, *globs: str, **more: object) -> Fetched:
    given = {"names": [], "limit": MIB, "timeout_s": 20.0} | more
    return fetch(connection, "src", dest, globs=globs, **given)  # type: ignore[arg-type]


def inside(folder: Path) -> dict[str, str]:
    """All that is in a folder, and only plain files and folders: with their text, or `/`."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode), path
        found[str(path.relative_to(folder))] = "/" if path.is_dir() else path.read_text(errors="surrogateescape")
    return found


def test_files_and_folders_come_with_time_and_mode(local_guest: Connection, cwd: Path, tmp_path: Path) -> None:
    (cwd / "out/deep").mkdir(parents=True)
    (cwd / "out/empty").mkdir()
    (cwd / "out/deep/a file").write_text("a")
    (cwd / "run").write_text("b")
    (cwd / "run").chmod(0o750)
    os.utime(cwd / "run", (1e9, 1e9))
    (cwd / "-n").write_text("c")
    os.link(cwd / "run", cwd / "run-2")
    done = get(local_guest, tmp_path / "got", "out", "run*", "*file", "-?", "out/*", names=["out/deep/a file"])
    expected = {"out": "/", "out/deep": "/", "out/empty": "/", "out/deep/a file": "a", "-n": "c"}
    assert inside(tmp_path / "got") == expected | {"run": "b", "run-2": "b"}
    assert done.files == {"out/deep/a file", "run", "run-2", "-n"}
    assert list(done.messages()) == ["*file: there is nothing of this name in the guest"]
    run = (tmp_path / "got/run").stat()
    assert (run.st_mtime, bool(run.st_mode & 0o100), run.st_nlink) == (1e9, True, 1)
    assert not (tmp_path / "got/-n").stat().st_mode & 0o111


def test_what_is_no_plain_file_stays_and_is_told(local_guest: Connection, cwd: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (cwd / "to-file").symlink_to(outside / "file")
    (cwd / "to-folder").symlink_to(outside)
    (cwd / "endless").symlink_to("/dev/zero")
    (cwd / "dangling").symlink_to("/nowhere")
    (cwd / "up").symlink_to("../../../../../../etc")
    os.mkfifo(cwd / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(cwd / "socket"))
    began = time.monotonic()
    done = get(local_guest, tmp_path / "got", "*", names=["to-file"])
    assert time.monotonic() - began < 15
    assert inside(tmp_path / "got") == {}
    names = {"to-file", "to-folder", "endless", "dangling", "up", "fifo", "socket"}
    assert set(done.left) == names
    told = list(done.messages())
    assert (
        f"and {len(names) - artifacts.NAMES_SHOWN} more: left in the guest: it is a link, or not a regular file" in told
    )
    assert len(told) == artifacts.NAMES_SHOWN + 1


def test_names_come_as_they_are_and_are_told_so_that_no_terminal_obeys(
    local_guest: Connection, cwd: Path, tmp_path: Path
) -> None:
    odd = ["two\nlines", "\x1b]0;title\x07", "\x9b31m", "it's $HOME `id`", os.fsdecode(b"caf\xe9"), "é😀", "a\\b", "*"]
    for name in odd:
        (cwd / name).write_text("x")
        (cwd / f"{name}-link").symlink_to("/nowhere")
    done = get(local_guest, tmp_path / "got", "*")
    assert inside(tmp_path / "got") == dict.fromkeys(odd, "x")
    assert all(line.isprintable() for line in done.messages())


def test_a_huge_file_stays_and_what_is_too_much_together_is_cut(
    local_guest: Connection, cwd: Path, tmp_path: Path
) -> None:
    with (cwd / "huge").open("wb") as data:
        data.truncate(1 << 40)
    (cwd / "report.xml").write_text("<testsuite/>")
    for number in range(9):
        (cwd / f"part-{number}").write_bytes(b"x" * (MIB // 4))
    began = time.monotonic()
    done = get(local_guest, tmp_path / "got", "*", names=["report.xml"])
    assert time.monotonic() - began < 15
    assert "report.xml" in done.files, "names come before what patterns match"
    assert done.left["huge"] == "left in the guest: it is larger than 1M"
    parts = [name for name in done.files if name.startswith("part-")]
    assert len(parts) == 3
    assert set(done.left.values()) == {done.left["huge"], artifacts._over_limit(MIB)}
    assert len(done.left) == 1 + 9 - 3
    assert sum(path.stat().st_size for path in (tmp_path / "got").iterdir()) <= MIB


def test_more_files_than_anybody_wants(
    local_guest: Connection, cwd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "FILES", 100)
    for number in range(150):
        (cwd / f"a file with a name that is not short {number}").touch()
    done = get(local_guest, tmp_path / "got", "*")
    assert len(inside(tmp_path / "got")) == len(done.files) == 100
    assert list(done.messages()) == ["more than 100 files and folders: the rest was left in the guest"]
    monkeypatch.setattr(artifacts, "LIST_BYTES", 1000)
    done = get(local_guest, tmp_path / "cut", "*")
    assert 10 < len(done.files) < 40
    assert len(list(done.messages())) == 1


def test_a_guest_that_hangs_costs_no_more_than_the_time_for_it(
    local_guest: Connection, cwd: Path, tmp_path: Path
) -> None:
    (cwd / "a").touch()
    for tool in ("find", "tar"):
        (tmp_path / f"bin/{tool}").write_text("#!/bin/sh\nexec sleep 100\n")
        (tmp_path / f"bin/{tool}").chmod(0o755)
        began = time.monotonic()
        done = get(local_guest, tmp_path / f"got-{tool}", "*", timeout_s=1.5)
        assert time.monotonic() - began < 10
        assert "the time limit was reached (artifacts_timeout_s)" in "".join(done.messages())
        (tmp_path / f"bin/{tool}").unlink()


def test_failures_in_the_guest_are_told(local_guest: Connection, cwd: Path, tmp_path: Path) -> None:
    (cwd / "a").touch()
    (tmp_path / "bin/tar").write_text("#!/bin/sh\necho 'tar: ./a: \x1b[1mPermission denied' >&2; exit 2\n")
    (tmp_path / "bin/tar").chmod(0o755)
    assert list(get(local_guest, tmp_path / "got", "*").messages()) == ["a: tar: ./a: Permission denied"]
    shutil.rmtree(cwd)
    (told,) = (line for line in get(local_guest, tmp_path / "none", "*").messages())
    assert told.startswith("not all could be listed: ")
    assert "src" in told


# ---- a guest whose tools lie


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.fixture
def lie(local_guest: Connection, cwd: Path, tmp_path: Path) -> Callable[[bytes, bytes], Fetched]:
    """Fetch from a guest that says and sends what it likes."""

    def call(listing: bytes, archive: bytes) -> Fetched:
        for tool, data in {"find": listing, "tar": archive}.items():
            (tmp_path / f"{tool}.data").write_bytes(data)
            (tmp_path / f"bin/{tool}").write_text(f"#!/bin/sh\nexec cat {tmp_path}/{tool}.data\n")
            (tmp_path / f"bin/{tool}").chmod(0o755)
        (cwd / "a").touch()
        shutil.rmtree(tmp_path / "got", ignore_errors=True)
        return get(local_guest, tmp_path / "got", "*")

    return call


def test_only_what_was_listed_and_asked_for_is_written(lie: Callable[[bytes, bytes], Fetched], tmp_path: Path) -> None:
    outside = tmp_path / "outside/file"
    names = [b"./../evil", b".//etc/evil", b"./x/../../evil", b"./a", b"./b", b"./c", b"./a/b", b"./" + b"n" * 300]
    listing = b"file\0" + b"\0".join(names) + b"\0"
    sent = tar(
        (member("../evil"), b"evil"),
        (member("/etc/evil"), b"evil"),
        (member("./a", tarfile.SYMTYPE, str(outside)), b""),
        (member("./a", tarfile.LNKTYPE, "../outside/file"), b""),
        (member("./a", tarfile.CHRTYPE), b""),
        (member("./a", tarfile.FIFOTYPE), b""),
        (member("./a"), b"fine"),
        (member("./a"), b"twice"),
        (member("./a/b"), b"below a file"),
        (member("./b", tarfile.LNKTYPE, "./a"), b""),
        (member("./c", tarfile.DIRTYPE), b""),
        (member("./unasked"), b"evil"),
        (member("./" + "n" * 300), b"too long"),
    )
    done = lie(listing, sent)
    assert inside(tmp_path / "got") == {"a": "fine", "b": "fine"}
    assert outside.read_text() == OUTSIDE
    assert not (tmp_path / "evil").exists()
    assert done.left["../evil"] == done.left["x/../../evil"] == "its name leads out of the folder"
    assert done.left["c"] == "the guest did not send it"
    assert "this host cannot store a file of this name" in done.left["a/b"]
    assert "this host cannot store a file of this name" in done.left["n" * 300]


def test_a_header_that_would_fill_the_memory_is_refused(
    lie: Callable[[bytes, bytes], Fetched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "META_BYTES", 4096)
    good = tar((member("./a"), b"fine"))
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
        long = tar((member("x", kind), b"a" * 5000))
        done = lie(b"file\0./a\0", long[: 512 + 5120] + good)
        assert done.left == {"a": "the guest sent a truncated or invalid tar"}
        assert inside(tmp_path / "got") == {}


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_file_that_came_in_part_is_not_there(
    lie: Callable[[bytes, bytes], Fetched], tmp_path: Path, keep: float
) -> None:
    sent = tar((member("./a"), b"x" * 100_000), (member("./b"), b"x" * 100_000))
    done = lie(b"file\0./a\0./b\0", sent[: int(len(sent) * keep)])
    assert all(len(text) == 100_000 for text in inside(tmp_path / "got").values())
    assert set(done.left) == {"a", "b"} - set(inside(tmp_path / "got"))


PIECES = st.one_of(
    st.binary(max_size=600),
    st.sampled_from([bytes(512), bytes(1024), tar((member("./a"), b"data")), tar((member("./a", b"S"), b"data"))]),
    st.sampled_from(
        [tar((member("x", kind), b"30 path=./a\n20 size=99\n" * 3))[:1024] for kind in (b"x", b"g", b"X", b"L", b"K")]
    ),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, max_size=6).map(b"".join))
@example(tar((member("x", b"x"), b"13 path=./a\n"))[:1024] * 2000)
def test_whatever_a_guest_sends_for_a_tar(tmp_path: Path, sent: bytes) -> None:
    done, dest = Fetched(), tmp_path / "got"
    shutil.rmtree(dest, ignore_errors=True)
    dest.mkdir()
    artifacts._unpack(io.BytesIO(sent), dest, {"a": None}, 100, done)
    assert set(inside(dest)) == done.files <= {"a"}
    assert sum(path.stat().st_size for path in dest.iterdir()) <= 100
