"""What `.gitignore` names: read as git reads it, left alone in the guest, and not sent where git does not track it."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import msgspec
import nearby
import pytest

from vmtasks.config.load import load
from vmtasks.config.scaffold import scaffold
from vmtasks.guest import gitignore
from vmtasks.guest.ssh import Target
from vmtasks.guest.tree import Walk
from vmtasks.suites.results import Results
from vmtasks.suites.run import send

pytestmark = pytest.mark.skipif(
    not (shutil.which("rsync") and shutil.which("git")), reason="rsync or git is not installed"
)

FOLDERS = ["a", "a/b", "a/b/a", "a/a b", "b", "b/.o", "build", "foo", "foo/ab", "[a]", "\u00e9"]
NAMES = [
    "a",
    "b",
    "ab",
    "a.o",
    "b.c",
    "x y",
    "build",
    "foo",
    "[a]",
    "a*",
    "\u00e9",
    "#a",
    "!a",
    "a\\b",
    "-",
    "]",
    " a",
    "a ",
]
PARTS = [
    "*", "**/", "/**", "?", "/", "a", "b", "ab", ".o", "build", "foo", "[ab]", "[!a]", "[a-c]", "[^b]", "\\",
    "\\*", "\\ ",
    " ", "!", "#", "\u00e9", "[[:alpha:]]", "[]]", "[]-a]", "[a", "a/", "/a", "-", "[\\]]", "[z-a]", "\t",
    "[[:foo:]]", "[!]a]",
    "[--0]",
]  # fmt: skip
TRICKY = [
    "*.o\n!keep.o\n", "build/\n!build/keep\n", "/a\n", "a/\n", "a/b\n", "**/b\n", "a/**\n", "a/**/a\n",
    "*\n!*/\n!*.c\n",
    "# a\n\\#a\n\\!a\n", "a \na\\ \n", "[a]\n", "\\[a]\n", "a\\\\b\n", "a\\*\n", "foo/*\n!foo/ab\n", "\ufeffa\n",
    "a.o\r\nb\r\n",
    "/*\n!/foo\n/foo/*\n!/foo/ab\n", "\n \n", "!a\n", "a\n!a\na\n", "***\n", "a\0b\n", "x y\n", "[!a-z]*\n",
    "b/\n!b\n",
]  # fmt: skip


def git(root: Path, *words: str, stdin: bytes = b"") -> bytes:
    options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.excludesFile=/dev/null"]
    return subprocess.run(
        ["git", "-C", str(root), *options, *words], input=stdin, capture_output=True, check=False
    ).stdout


@pytest.fixture
def forest(tmp_path: Path) -> Path:
    root = tmp_path / "forest"
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("", *FOLDERS):
        for name in NAMES:
            if not (root / folder / name).exists():
                (root / folder / name).touch()
    git(root, "init", "-q")
    return root


def ignored_by_git(root: Path) -> set[bytes]:
    """Folders that are ignored as a whole are named, and not what is in them."""
    said = git(root, "ls-files", "-z", "--others", "--ignored", "--exclude-per-directory=.gitignore", "--directory")
    return set(said.split(b"\0")[:-1])


def ignored_by_us(root: Path) -> set[bytes]:
    walk = Walk(root, ["/.git/"], gitignore=True)
    for _ in walk:
        pass
    return set(walk.ignored)


def all_paths(root: Path) -> list[bytes]:
    return [os.fsencode(path.relative_to(root)) for path in sorted(root.rglob("*")) if ".git" not in path.parts]


def as_git_check_ignore(root: Path) -> set[bytes]:
    """Every path that git says is ignored, by itself or with a folder above it."""
    paths = all_paths(root)
    words = ("check-ignore", "--no-index", "-z", "--stdin")
    return set(git(root, *words, stdin=b"".join(path + b"\0" for path in paths)).split(b"\0")[:-1])


def named_by_us(root: Path) -> set[bytes]:
    walk = Walk(root, ["/.git/"], gitignore=True)
    for _ in walk:
        pass
    return {path for path in all_paths(root) if walk.ignores(path + b"/" * (root / os.fsdecode(path)).is_dir())}


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_rules_are_read_as_git_reads_them(text: str, forest: Path) -> None:
    (forest / ".gitignore").write_text(text, newline="")
    assert named_by_us(forest) == as_git_check_ignore(forest)


@pytest.mark.parametrize("seed", range(4))
def test_any_rules_are_read_as_git_reads_them(seed: int, forest: Path) -> None:
    """Two stars that are no whole part of a path are left out: git itself takes them now so, now so."""
    chance = random.Random(seed)  # noqa: S311 - repeatable
    for _ in range(12):
        for folder in ("", "a", "a/b"):
            lines = ["".join(chance.choices(PARTS, k=chance.randint(1, 4))) for _ in range(chance.randint(0, 3))]
            text = "".join(line.replace("**", "*") + "\n" for line in lines)
            (forest / folder / ".gitignore").write_text(text)
        assert named_by_us(forest) == as_git_check_ignore(forest), [
            (folder, (forest / folder / ".gitignore").read_text()) for folder in ("", "a", "a/b")
        ]


@pytest.mark.parametrize("glob", [b"a**b", b"**", b"[", b"[[:bad:]]", b"\\", b"*" * 50 + b"a"])
def test_odd_globs_are_no_bugs(glob: bytes) -> None:
    rules = gitignore.parse(glob + b"\n" + b"x\n")
    assert rules is not None
    assert rules.ignores(b"", b"x", folder=False)


def test_a_rule_cannot_keep_the_walk_busy() -> None:
    rules = gitignore.parse(b"a*a*a*a*a*a*a*a*b\n")
    assert rules is not None
    assert not rules.ignores(b"", b"a" * 60, folder=False)


# ---- what is sent, and what is deleted


class Guest:
    """A project in a git repository, and a guest that it is synced to."""

    def __init__(self, root: Path, home: Path, target: Target) -> None:
        self.root, self.home, self.target = root, home, target
        self.src = home / "src"

    def write(self, *names: str, at: str = "") -> None:
        for name in names:
            path = (self.src if at == "guest" else self.root) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name} of {at or 'host'}")

    def sync(self, **table: object) -> list[str]:
        """What rsync has deleted."""
        config = load(self.root, {}, {"VMTASKS_STORE": str(self.home / "store"), "HOME": str(self.home)})
        table = {"exclude": ["/.git/", *config.sync.exclude], **table}
        config = msgspec.structs.replace(config, sync=msgspec.structs.replace(config.sync, **table))
        return list(send(Results(config), self.target, lambda _: None).deleted)

    def there(self) -> set[str]:
        found = {str(path.relative_to(self.src)) for path in self.src.rglob("*") if path.is_file()}
        return {name for name in found if not name.startswith(("config/", "phases/", "dodo.py", ".git"))}


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    root, folder = tmp_path / "project", tmp_path / "ssh"
    scaffold(root, "tiny")
    git(root, "init", "-q")
    target = Target("vm", 22220, "dev", folder / "key", (), folder)
    return Guest(root, nearby.lead_here(tmp_path, monkeypatch, target.config), target)


def test_what_was_built_there_stays(guest: Guest) -> None:
    (guest.root / ".gitignore").write_text("*.o\n/out/\n!/out/\n/out/*\n")
    guest.write("a.c", "lib/b.c", "old.c", "gone/c.c")
    guest.sync()
    built = ("a.o", "lib/b.o", "lib/deep/x.o", "out/app", "out/deep/log", "odd name [1]*.o", "\u00e9\n.o")
    guest.write(*built, at="guest")
    guest.write("stray", "gone/c.o", at="guest")
    (guest.root / "old.c").unlink()
    shutil.rmtree(guest.root / "gone")
    guest.write("a.c")
    assert sorted(guest.sync()) == ["gone/c.c", "old.c", "stray"]
    assert guest.there() == {"a.c", "lib/b.c", "gone/c.o", *built}
    assert guest.sync() == []


def test_products_of_this_host_stay_here(guest: Guest) -> None:
    (guest.root / ".gitignore").write_text("*.o\n/out/\n")
    guest.write("a.c", "a.o", "out/app", "kept.o", "out/kept")
    git(guest.root, "add", "-f", "kept.o", "out/kept")
    guest.sync()
    assert guest.there() == {"a.c", "kept.o", "out/kept"}, "what git tracks is sent, whatever names it"
    guest.write("a.o", "out/app", at="guest")
    guest.sync()
    assert (guest.src / "a.o").read_text() == "a.o of guest"
    (guest.root / "kept.o").unlink()
    assert guest.sync() == ["kept.o"]


def test_a_pattern_of_the_users_own_comes_first(guest: Guest) -> None:
    (guest.root / ".gitignore").write_text("/configure\n*.o\n")
    guest.write("configure", "a.o")
    guest.sync(exclude=["/.git/", "+ /configure"])
    assert guest.there() == {"configure"}


def test_without_git_all_is_sent_and_what_was_built_there_stays(guest: Guest) -> None:
    """A release's archive holds what was generated, which its .gitignore names."""
    shutil.rmtree(guest.root / ".git")
    (guest.root / ".gitignore").write_text("/configure\n*.o\n")
    guest.write("configure")
    guest.sync()
    guest.write("a.o", at="guest")
    assert guest.sync() == []
    assert guest.there() == {"configure", "a.o"}


def test_it_can_be_switched_off(guest: Guest) -> None:
    (guest.root / ".gitignore").write_text("*.o\n")
    guest.write("a.o")
    guest.sync(gitignore=False)
    guest.write("b.o", at="guest")
    assert guest.there() == {"a.o", "b.o"}
    assert guest.sync(gitignore=False) == ["b.o"]


def test_a_repository_around_and_one_inside(guest: Guest) -> None:
    (guest.root / ".gitignore").write_text("*.log\n/tree/top.o\n")
    guest.write("tree/a.log", "tree/top.o", "tree/sub/top.o", "tree/inner/b.log", "tree/inner/c.o")
    git(guest.root / "tree/inner", "init", "-q")
    (guest.root / "tree/inner/.gitignore").write_text("*.o\n")
    walk = Walk(guest.root / "tree", gitignore=True)
    sent = {name for name, _ in walk if b".git" not in name}
    assert sent == {b"inner", b"inner/b.log", b"sub", b"sub/top.o"}
    assert sorted(walk.ignored) == [b"a.log", b"inner/c.o", b"top.o"]


def test_a_tree_that_its_repository_ignores_is_synced_whole(guest: Guest) -> None:
    (guest.root / ".gitignore").write_text("/out/\n*.o\n")
    guest.write("out/tree/a.o", "out/tree/b.c")
    assert {name for name, _ in Walk(guest.root / "out/tree", gitignore=True)} == {b"a.o", b"b.c"}


@pytest.mark.parametrize("change", ["a.o", "out/x"])
def test_products_of_this_host_make_no_suite_stale(change: str, guest: Guest) -> None:
    (guest.root / ".gitignore").write_text("*.o\n/out/\n")
    guest.write("a.c", "out/app")

    def digest() -> str:
        config = load(guest.root, {}, {"VMTASKS_STORE": str(guest.home / "store"), "HOME": str(guest.home)})
        return Results(config).tree

    before = digest()
    guest.write(change)
    assert digest() == before
    guest.write("b.c")
    assert digest() != before


def test_what_git_sees_is_what_we_see(forest: Path) -> None:
    """With an index: what it tracks is not ignored, and the rest is."""
    (forest / ".gitignore").write_text("*.o\n/build/\na/b/\n")
    git(forest, "add", "-f", "a.o", "build/b.c", "a/b/a/a.o")
    ours = ignored_by_us(forest)
    assert ours == ignored_by_git(forest)


def test_a_link_in_its_place_is_not_followed(forest: Path, tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("*\n")
    (forest / ".gitignore").symlink_to(tmp_path / "rules")
    assert ignored_by_us(forest) == set()


def test_a_guest_after_a_power_cut_is_built_anew(guest: Guest) -> None:
    (guest.root / ".gitignore").write_text("*.o\n")
    guest.write("a.c")
    guest.sync()
    guest.write("a.o", at="guest")
    config = load(guest.root, {}, {"VMTASKS_STORE": str(guest.home / "store"), "HOME": str(guest.home)})
    assert send(Results(config), guest.target, lambda _: None, thorough=True).deleted == ("a.o",)
