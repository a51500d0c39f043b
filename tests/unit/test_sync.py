"""What rsync really sends, against what we say of it: itemised, excluded, and in the tree's digest."""

import os
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import nearby
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from vmtasks.config.load import load
from vmtasks.config.scaffold import scaffold
from vmtasks.errors import CommandError, SshError
from vmtasks.guest import tree
from vmtasks.guest.ssh import Target
from vmtasks.guest.sync import PARTIAL, VANISHED, Filter, SentReporter, Synced, copy, parse_itemized
from vmtasks.guest.sync import sync as sync_by_rules
from vmtasks.guest.tree import Walk
from vmtasks.guest.tree import tree_digest as digest_of
from vmtasks.host import process
from vmtasks.suites.results import Results
from vmtasks.suites.run import Suites

pytestmark = pytest.mark.skipif(not shutil.which("rsync"), reason="rsync is not installed")

GO_SYNTH = Path(__file__).parents[2] / "examples/go-synth/vm.toml"


@pytest.fixture(params=["plain", "odd 'name', $x \"y\""])
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    folder = tmp_path / request.param
    folder.mkdir()
    target = Target("vm", 22220, "dev", folder / "key", (), folder)
    nearby.lead_here(tmp_path, monkeypatch, target.config)
    return target


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    (root / "sub").mkdir(parents=True)
    (root / "a").write_text("a")
    (root / "sub/b c").write_text("b")
    (root / "link").symlink_to("a")
    (root / "empty").mkdir()
    return root


def sync(target: Target, source: Path, dest: str, exclude: list[str], *, delete: bool = True) -> Synced:
    return sync_by_rules(target, source, dest, Filter(exclude=exclude), delete=delete)


def tree_digest(root: Path, exclude: list[str], cache: Path | None = None) -> str:
    return digest_of(Walk(root, exclude), cache)


def seen(walk: Walk) -> set[str]:
    return {os.fsdecode(name) for name, _ in walk}


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# ---- sync


@pytest.mark.parametrize("dest", ["src", "new/deep/folder", "a folder 'x' $HOME *"])
def test_sync_makes_the_folder_equal(dest: str, target: Target, source: Path, tmp_path: Path):
    there = tmp_path / "home" / dest
    assert len(sync(target, source, dest, []).sent) == 3
    assert listing(there) == listing(source)
    assert str(sync(target, source, dest, [])) == "nothing to send"
    (source / "a").write_text("changed")
    (source / "sub/b c").unlink()
    assert str(sync(target, source, dest, [])) == "1 sent, 1 deleted"
    assert (there / "a").read_text() == "changed"
    assert listing(there) == listing(source)


def test_sync_to_an_absolute_folder_and_through_csh(
    target: Target, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if csh := shutil.which("csh"):
        monkeypatch.setenv("LOGIN_SHELL", csh)
    sync(target, source, str(tmp_path / "else where"), [])
    assert listing(tmp_path / "else where") == listing(source)


def test_sync_without_delete(target: Target, source: Path, tmp_path: Path):
    sync(target, source, "src", [])
    (tmp_path / "home/src/made there").touch()
    assert sync(target, source, "src", [], delete=False) == Synced((), ())
    assert sync(target, source, "src", []) == Synced((), ("made there",))


def test_what_is_excluded_is_neither_sent_nor_deleted(target: Target, source: Path, tmp_path: Path):
    sync(target, source, "src", ["/build/"])
    (tmp_path / "home/src/build").mkdir()
    (source / "build").mkdir()
    (source / "build/x").touch()
    assert sync(target, source, "src", ["/build/"]) == Synced((), ())
    assert (tmp_path / "home/src/build").exists()


def test_anchored_patterns_leave_out_only_what_stands_at_the_top(target: Target, source: Path, tmp_path: Path):
    """As go-synth's own rules did not: its scripts/vm/ and a folder cmd/go-synth/ never arrived."""
    exclude = tomllib.loads(GO_SYNTH.read_text())["sync"]["exclude"]
    kept = ["scripts/vm/provision.sh", "cmd/go-synth/main.go", ".git/HEAD", "build/build.go"]
    for name in (*kept, "vm/disk.qcow2", "go-synth", "logs/build.log", "builds.db", "stats/stats.db"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    there = tmp_path / "home/go-synth"
    (there / "vm").mkdir(parents=True)
    for name in ("vm/own", "go-synth", "old.go"):
        (there / name).write_text("of the guest")
    beside = tmp_path / "home/beside"
    beside.write_text("not ours")
    done = sync(target, source, "go-synth", exclude)
    files = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file() and not path.is_symlink()}
    assert files == {*kept, "a", "sub/b c", "vm/own", "go-synth"}
    assert done.deleted == ("old.go",)
    assert (there / "go-synth").read_text() == "of the guest"
    assert beside.read_text() == "not ours"
    assert sync(target, source, "go-synth", exclude) == Synced((), ()), "the second run sends nothing"
    (source / "cmd/go-synth/main.go").unlink()
    assert "cmd/go-synth/main.go" in sync(target, source, "go-synth", exclude).deleted


def test_sync_that_loses_its_connection(target: Target, source: Path, tmp_path: Path):
    (tmp_path / "bin/ssh").write_text("#!/bin/sh\necho 'Connection refused' >&2\nexit 255\n")
    with pytest.raises(SshError, match="Connection refused"):
        sync(target, source, "src", [])


def test_sync_that_cannot_write(target: Target, source: Path, tmp_path: Path):
    (tmp_path / "home/src").write_text("a file")
    with pytest.raises((CommandError, SshError)):
        sync(target, source, "src", [])


# ---- itemised


ODD_NAMES = [
    "plain",
    " leading",
    "trailing ",
    "two  spaces",
    "*deleting x",
    "<f+++++++++ x",
    "\u2028line",
    "\x85next",
    "a\\#b",
    "é",
    "x\x0cy",
]


def test_itemised_names_are_those_of_the_files(tmp_path: Path):
    for name in ODD_NAMES:
        (tmp_path / "from" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "from" / name).touch()
    (tmp_path / "from/dir").mkdir()

    def run() -> Synced:
        argv = ["rsync", "-rlptD8", "--delete", "--out-format=%i %n", f"{tmp_path}/from/", f"{tmp_path}/to/"]
        return parse_itemized(subprocess.run(argv, capture_output=True, check=True).stdout.decode())

    printable = {name for name in ODD_NAMES if name not in {"x\x0cy", "a\\#b"}}  # rsync writes those in its own way
    assert printable <= set(run().sent)
    assert parse_itemized("") == Synced((), ())
    shutil.rmtree(tmp_path / "from")
    (tmp_path / "from").mkdir()
    deleted = run().deleted
    assert printable | {"dir/"} <= set(deleted)
    assert len(deleted) == len(ODD_NAMES) + 1


def test_itemised_counts_files_and_links_not_folders_and_times():
    out = (
        "cd+++++++++ ./\n<f+++++++++ new\n<f.st...... changed\ncL+++++++++ link -> new\n.d..t...... dir/\n"
        ".f...p..... only mode\nhf+++++++++ hard => new\n*deleting   old\nnoise\n"
    )
    assert parse_itemized(out) == Synced(("new", "changed", "link -> new", "hard => new"), ("old",))


# ---- exclude patterns

NAMES = ["a", "b", "ab", "a.o", "b.c", "é.o", "a.o\n", "A", "build"]
SPECIAL = [
    "*", "?", "/", "//", "a/", "/a/", "*/", "/*", "/*/", "a/b", "a/*", "/a/b", "*.o", "build/", "/build", "!", "a//",
    "//a", "./a", "a/.", "a/b/", "**", "a**", "**/a", "[ab]", "\\a", "a\\*", ".", "..", "a/../b", "?.o", "é*", "***",
    "a/***",
]  # fmt: skip
PATTERN = st.text("ab.*?/o+-! é", min_size=1, max_size=6) | st.sampled_from([*SPECIAL, "+ a", "- a", "+ *.o", "+ /a/"])


@pytest.fixture(scope="module")
def forest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders, files and links of the same few names, three deep."""
    root = tmp_path_factory.mktemp("forest")
    for outer in ("a", "b", "build"):
        for inner in ("a", "ab", "build"):
            folder = root / outer / inner
            folder.mkdir(parents=True)
            for name in NAMES:
                if not (folder / name).exists():
                    (folder / name).touch()
        (root / outer / "b").symlink_to("a")
        (root / outer / "x.o").symlink_to("nowhere")
    for name in NAMES:
        if not (root / name).exists():
            (root / name).touch()
    (root / "links").symlink_to("a")
    return root


def sent_by_rsync(root: Path, patterns: list[str], to: Path) -> set[str] | None:
    """What rsync would send to an empty place, as sync() runs it; None when it takes no such pattern."""
    argv = ["rsync", "-rlptDs8n", "--out-format=%n", *(f"--exclude={p}" for p in patterns), f"{root}/", f"{to}/"]
    done = subprocess.run(argv, capture_output=True, check=False)
    if done.returncode == 1:
        return None
    said = done.stdout.decode()
    return {line.replace("\\#012", "\n").rstrip("/") for line in said.split("\n")} - {
        "",
        ".",
        "created directory " + str(to),
    }


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patterns=st.lists(PATTERN, max_size=4))
@example(patterns=["*.o"])
@example(patterns=["+ a.o", "*.o"])
@example(patterns=["*.o", "!"])
@example(patterns=["?", "+ ?", "!"])
@example(patterns=["?.o"])
@example(patterns=["b/"])
@example(patterns=["a//"])
@example(patterns=["//a"])
def test_the_digest_never_omits_what_rsync_sends(patterns: list[str], forest: Path, tmp_path: Path):
    sent = sent_by_rsync(forest, patterns, tmp_path / "to")
    assume(sent is not None)
    known = seen(Walk(forest, patterns))
    assert sent - known == set(), "a change of these would not be noticed"
    if all(p in {"*.o", "/build/", "build", "a/", "/a/b", "?"} for p in patterns):
        assert known - sent == set(), "usual patterns are understood exactly"


@pytest.mark.parametrize(
    "pattern", ["*.o", "/build/", "build", "a/", "/a/b", "b", "a/b", "?", "/*", "*/", "é*", "a*", "/a/*"]
)
def test_usual_patterns_are_understood_exactly(pattern: str, forest: Path, tmp_path: Path):
    assert seen(Walk(forest, [pattern])) == sent_by_rsync(forest, [pattern], tmp_path / "to")


# ---- the digest of a tree


def settle(root: Path, cache: Path) -> str:
    """The digest, with all files remembered as if they had not changed for long."""
    tree.SETTLED_NS, before = -(10**12), tree.SETTLED_NS
    try:
        return tree_digest(root, [], cache)
    finally:
        tree.SETTLED_NS = before


CHANGES = {
    "content": lambda root: (root / "a").write_text("A"),
    "content longer": lambda root: (root / "a").write_text("aa"),
    "mode": lambda root: (root / "a").chmod(0o755),
    "mode of a folder": lambda root: (root / "empty").chmod(0o700),
    "link": lambda root: ((root / "link").unlink(), (root / "link").symlink_to("b")),
    "link to file": lambda root: ((root / "link").unlink(), (root / "link").write_text("a")),
    "rename": lambda root: (root / "a").rename(root / "A"),
    "move": lambda root: (root / "a").rename(root / "sub/a"),
    "new": lambda root: (root / "new").touch(),
    "new folder": lambda root: (root / "sub/new").mkdir(),
    "gone": lambda root: (root / "a").unlink(),
    "folder to fifo": lambda root: (
        (root / "empty").rmdir(), os.mkfifo(root / "empty"), (root / "empty").chmod(0o755),
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cached", [False, True])
def test_any_change_shows(change: str, cached: bool, source: Path, tmp_path: Path):  # noqa: FBT001
    cache = tmp_path / "cache.json" if cached else None
    before = settle(source, cache) if cache else tree_digest(source, [])
    assert tree_digest(source, [], cache) == before
    CHANGES[change](source)
    assert tree_digest(source, [], cache) != before


def test_times_and_places_do_not_show(source: Path, tmp_path: Path):
    before = tree_digest(source, [])
    os.utime(source / "a", (0, 0))
    assert tree_digest(source, []) == before
    assert tree_digest(source.rename(tmp_path / "moved"), []) == before


def test_what_is_excluded_does_not_show(source: Path):
    before = tree_digest(source, ["*.o"])
    (source / "x.o").touch()
    assert tree_digest(source, ["*.o"]) == before


def test_a_change_that_keeps_size_and_time_shows(source: Path, tmp_path: Path):
    """As `sed -i` followed by `touch -r` makes it, or an unpacked archive."""
    path, cache = source / "a", tmp_path / "cache.json"
    before, stat = settle(source, cache), path.stat()
    time.sleep(0.02)
    path.write_text("A")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert tree_digest(source, [], cache) != before


def test_a_second_change_in_the_same_moment_shows(source: Path, tmp_path: Path):
    cache = tmp_path / "cache.json"
    digests = set()
    for n in range(50):
        (source / "a").write_text(f"{n:02d}")
        digests.add(tree_digest(source, [], cache))
    assert len(digests) == 50


def test_the_cache_is_used(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "cache.json"
    before = settle(source, cache)
    monkeypatch.setattr(tree, "_sha256", lambda path: pytest.fail(f"{path} was read"))
    assert tree_digest(source, [], cache) == before


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{", '{"a": 5}', '{"a": []}', '{"a": null}', '{"a": ["x"]}', "\0"]
)
def test_a_damaged_cache_costs_only_time(content: str, source: Path, tmp_path: Path):
    cache = tmp_path / "cache.json"
    cache.write_text(content)
    assert tree_digest(source, [], cache) == tree_digest(source, [])


def test_names_that_are_no_text(source: Path, tmp_path: Path):
    (Path(os.fsdecode(os.fsencode(source) + b"/\xff"))).touch()
    assert tree_digest(source, ["*.o"], tmp_path / "c") == tree_digest(source, ["*.o"], tmp_path / "c")


def test_what_cannot_be_copied_back_is_named_and_the_rest_is_copied(target: Target, source: Path, tmp_path: Path):
    (tmp_path / "back/a/full").mkdir(parents=True)  # in the way of a file; root too cannot put that there
    with pytest.raises(CommandError) as error:
        copy(target, f"{source}/", f"{tmp_path}/back/", back=True)
    assert error.value.status == PARTIAL
    assert "could not make way for" in error.value.message
    assert "\n" not in error.value.message
    assert (tmp_path / "back/sub/b c").read_text() == "b"


def test_what_ssh_has_said_is_the_reason(target: Target, tmp_path: Path):
    (tmp_path / "bin/ssh").write_text("#!/bin/sh\necho 'ssh: Connection refused' >&2; exit 255\n")
    with pytest.raises(SshError, match=r"to vm: ssh: Connection refused\Z"):
        copy(target, "x/", f"{tmp_path}/", back=True)


# ---- a tree that changes, or cannot all be read


def test_what_goes_during_the_scan_is_as_if_it_had_not_been_there(source: Path):
    names = []
    for name, _ in Walk(source):
        names.append(name)
        if name == b"empty":
            (source / "link").unlink()
            shutil.rmtree(source / "sub")
    assert names == [b"a", b"empty", b"link", b"sub"], "a folder that has been listed stays as it was then"


def test_what_goes_between_its_listing_and_a_look_at_it_is_left_out(source: Path, monkeypatch: pytest.MonkeyPatch):
    def list_and_remove(folder: bytes) -> list[bytes]:
        (source / "a").unlink(missing_ok=True)
        (source / "sub/b c").unlink(missing_ok=True)
        return {os.fsencode(source): [b"a", b"empty", b"link", b"sub"]}.get(folder, [b"b c"])

    monkeypatch.setattr("vmtasks.guest.tree._list", list_and_remove)
    assert [name for name, _ in Walk(source)] == [b"empty", b"link", b"sub"]


def test_a_digest_of_files_that_come_and_go(source: Path):
    def churn() -> None:
        while not over.is_set():
            for n in range(20):
                (source / f"sub/new{n}").write_text("x")
                (source / f"sub/new{n}").rename(source / f"sub/old{n}")
            shutil.rmtree(source / "deep", ignore_errors=True)
            (source / "deep/er").mkdir(parents=True)

    over = threading.Event()
    thread = threading.Thread(target=churn)
    thread.start()
    try:
        digests = {tree_digest(source, []) for _ in range(300)}
    finally:
        over.set()
        thread.join()
    assert len(digests) > 1


def without_privilege(code: str, *words: str) -> str:
    """What Python code prints that may not override permissions, also when root runs the tests."""
    with process.spawn([sys.executable, "-c", code, *words], pipe=True, merge=True, unprivileged=True) as child:
        return child.communicate(timeout=60)[0].decode()


DIGEST = """
import sys, pathlib
from vmtasks.errors import StateError
from vmtasks.guest.tree import Walk, tree_digest
try:
    tree_digest(Walk(pathlib.Path(sys.argv[1])))
except StateError as error:
    print(error)
"""
SYNC = """
import sys, pathlib
from vmtasks.errors import CommandError
from vmtasks.guest.ssh import Target
from vmtasks.guest.sync import read_failed, sync, write_denied
folder = pathlib.Path(sys.argv[2])
try:
    sync(Target("vm", 22220, "dev", folder / "key", (), folder), pathlib.Path(sys.argv[1]), "src")
except CommandError as error:
    print(error.message, write_denied(error), read_failed(error), sep="\\n")
"""


@pytest.mark.parametrize("name", ["a", "sub"])
def test_what_cannot_be_read_is_named(name: str, source: Path):
    (source / name).chmod(0)
    said = without_privilege(DIGEST, str(source))
    (source / name).chmod(0o755)
    assert said.startswith(f"{source}/{name}: cannot be read: Permission denied\nhint: ")
    assert "sync.exclude" in said


def test_what_a_sync_may_not_read_is_told_apart(target: Target, source: Path):
    (source / "a").chmod(0)
    said = without_privilege(SYNC, str(source), str(target.folder)).splitlines()
    (source / "a").chmod(0o644)
    assert said[0].endswith(f'failed to open "{source}/a": Permission denied (13)')
    assert "rsync" not in said[0]
    assert said[1:] == ["False", "True"], "nothing is wrong with the guest"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_what_a_sync_may_not_write_is_told_apart(target: Target, source: Path, tmp_path: Path):
    sync(target, source, "src", [])
    os.chown(tmp_path / "home/src", 65534, 65534)
    (source / "a").write_text("new")
    said = without_privilege(SYNC, str(source), str(target.folder)).splitlines()
    assert "Permission denied" in said[0] or "Operation not permitted" in said[0]
    assert said[1:] == ["True", "False"]


@pytest.mark.parametrize("times", [1, 2])
def test_rsync_runs_once_more_when_files_have_gone(times: int, target: Target, source: Path, tmp_path: Path):
    real, calls = shutil.which("rsync"), tmp_path / "calls"
    (tmp_path / "bin/rsync").write_text(
        f'#!/bin/sh\ncase $* in *--server*) exec {real} "$@";; esac\necho >>\'{calls}\'\n{real} "$@" || exit\n'
        f"test $(wc -l <'{calls}') -gt {times} || {{ echo 'file has vanished: \"x\"' >&2; exit 24; }}\n"
    )
    (tmp_path / "bin/rsync").chmod(0o755)
    if times == 1:
        assert len(sync(target, source, "src", []).sent) == 3
    else:
        with pytest.raises(CommandError, match=r'\Afile has vanished: "x"\Z') as error:
            sync(target, source, "src", [])
        assert error.value.status == VANISHED
    assert len(calls.read_text().splitlines()) == 2


def test_holes_stay_holes(target: Target, source: Path, tmp_path: Path):
    with (source / "sparse").open("wb") as file:
        file.truncate(64 << 20)
    sync(target, source, "src", [])
    copied = (tmp_path / "home/src/sparse").stat()
    assert copied.st_size == 64 << 20
    assert copied.st_blocks * 512 < 1 << 20


def test_a_long_sync_says_how_far_it_is(target: Target, source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SentReporter, "EVERY_S", 0.0)
    said: list[str] = []
    sync_by_rules(target, source, "src", keep=lambda _: False, say=said.append)
    assert said
    assert said[-1] == "3 of 3 files sent"


@pytest.mark.parametrize(
    ("stderr", "status", "hint"),
    [
        ('rsync: [sender] send_files failed to open "/s/a": Permission denied (13)', 23, "make it readable"),
        ('rsync: [receiver] write failed on "/h/a": No space left on device (28)', 11, "larger disk_size"),
        ('file has vanished: "/s/a"', 24, "make it readable, or name it in sync.exclude"),
        ('rsync: [generator] recv_generator: mkdir "/h/a" failed: Read-only file system (30)', 23, "doit ssh"),
    ],
)
def test_a_sync_that_fails_says_one_sentence_and_what_to_do(
    stderr: str, status: int, hint: str, target: Target, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scaffold(source, "tiny")
    (tmp_path / "bin/rsync").write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit {status}\n")
    (tmp_path / "bin/rsync").chmod(0o755)
    suites = Suites(Results(load(source, {}, {"HOME": str(tmp_path), "VMTASKS_STORE": str(tmp_path / "store")})))
    suites.machine.folder.mkdir(parents=True)
    monkeypatch.setattr(suites.machine, "require_running", lambda: target)
    with pytest.raises(CommandError) as error:
        suites.sync()
    assert error.value.message.startswith("sync: ")
    assert "\n" not in error.value.message
    assert "rsync" not in error.value.message
    assert hint in error.value.hint
