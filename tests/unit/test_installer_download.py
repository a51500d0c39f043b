"""`doit fetch` for a guest whose installer is downloaded: mirrors, digests, lists of sums, and what is kept of it."""

import bz2
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import tomli_w

from httpserver import Site, serving
from vmtasks.config import rules
from vmtasks.config.load import help_table, load, schema
from vmtasks.config.tables import GuestFile
from vmtasks.errors import ConfigError, FetchError
from vmtasks.images.steps import Builder
from vmtasks.installer.download import fetch
from vmtasks.installer.download.want import Release
from vmtasks.store.records import MediaRecord, read_record

TOP = Path(__file__).parents[2]
ISO = b"CD001 made up" * 5000
PACKED = bz2.compress(ISO)
FILE = "bsd-1.0_REL.iso.bz2"
GONE = "http://127.0.0.1:9"
"""Nobody listens there."""
PHASE = {"name": "1-install", "boot": "cd", "cds": ["installer", "phase"]}


def digest(data: bytes, of: str, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()} of {of}"


KNOWN = {"1.0": [digest(PACKED, "download", "md5"), digest(ISO, "content")]}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "BSD_MIRROR", "BSD_VERSION"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def project(
    root: Path, *mirrors: str, version: str = "", store: Path | None = None, phase: dict | None = None, **keys
) -> Builder:
    """A project with one made-up guest, and a store beside it."""
    folder = root / "phases/bsd"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "config").mkdir(exist_ok=True)
    (root / "config/vm.toml").write_text('guest = "bsd"\n')
    (folder / "1-install.sh.j2").write_text("true\n")
    installer = {"source": "download", "file": "bsd-{version}_REL.iso.bz2", "mirrors": list(mirrors), **keys}
    guest = {"name": "bsd", "version": "1.0", "version_env": "BSD_VERSION", "installer": installer}
    guest["phases"] = [{**PHASE, **(phase or {})}]
    jsonschema.validate(guest, json.loads(schema(GuestFile)))
    (folder / "guest.toml").write_text(tomli_w.dumps(guest))
    variables = {"store": str(store or root.parent / "store"), "dir": str(root / ".vm")}
    config = load(root, variables, {"HOME": str(root), "BSD_VERSION": version})
    rules.check(config)
    return Builder(config)


def record(builder: Builder) -> MediaRecord:
    found = read_record(builder.installer_record, MediaRecord)
    assert found is not None
    return found


def assert_fetched(builder: Builder, iso: bytes = ISO) -> MediaRecord:
    """The installer is in the store under its digest, read-only, and its record can be believed."""
    found = record(builder)
    assert found.sha256 == hashlib.sha256(iso).hexdigest()
    assert found.size == len(iso)
    assert builder.installer() == builder.store.root / "downloads" / found.sha256
    assert builder.installer().read_bytes() == iso
    assert builder.installer().stat().st_mode & 0o777 == 0o444
    assert builder.why_stale("fetch") == ""
    return found


def refused(builder: Builder, match: str) -> FetchError:
    """The error of a fetch that leaves no record and nothing that could be taken for an ISO."""
    with pytest.raises(FetchError, match=match) as caught:
        builder.fetch()
    assert caught.value.hint
    assert not builder.installer_record.exists()
    assert not [p for p in (builder.store.root / "downloads").glob("*") if len(p.name) == 64]
    return caught.value


def paths(site: Site) -> list[str]:
    return [asked.path for asked in site.asked]


# -- what works


def test_a_good_download_is_unpacked_recorded_and_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with serving({f"iso/{FILE}": PACKED}) as site:
        builder = project(tmp_path / "a", site.url("iso/"), digests=KNOWN)
        builder.fetch()
        found = assert_fetched(builder)
        assert (found.origin, found.verified) == (site.url(f"iso/{FILE}"), "guest.toml")
        builder.fetch()
        assert len(site.asked) == 1
    said = capsys.readouterr().out
    assert f"fetch: the installer: {FILE}" in said
    assert "(100 %)" in said


def test_the_second_mirror_when_the_first_has_no_such_file(tmp_path: Path):
    with serving({}) as first, serving({FILE: PACKED}) as second:
        builder = project(tmp_path / "a", first.base, second.base, digests=KNOWN)
        builder.fetch()
        assert assert_fetched(builder).origin == second.url(FILE)
        assert paths(first) == [FILE]


def test_a_second_project_needs_no_network(tmp_path: Path):
    """Neither with the same guest.toml nor with one that names other mirrors."""
    with serving({FILE: PACKED}) as site:
        one = project(tmp_path / "one", site.base, digests=KNOWN)
        one.fetch()
    for name, mirror in (("same", site.base), ("other", GONE)):
        builder = project(tmp_path / name, mirror, digests=KNOWN)
        builder.fetch()
        assert assert_fetched(builder) == record(one)
    fewer = project(tmp_path / "fewer", GONE, digests={"1.0": KNOWN["1.0"][:1]})
    fewer.fetch()
    assert assert_fetched(fewer).origin == site.url(FILE)


@pytest.mark.parametrize("form", ["{folder}", "{folder}/", "file://{folder}", f"{{folder}}/{FILE}", "isos"])
def test_local_folders_and_files_in_place_of_the_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str):
    folder = tmp_path / "isos"
    folder.mkdir()
    (folder / FILE).write_bytes(PACKED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BSD_MIRROR", form.format(folder=folder))
    builder = project(tmp_path / "a", GONE, mirror_env="BSD_MIRROR", digests=KNOWN)
    builder.fetch()
    assert assert_fetched(builder).origin.endswith(f"{folder}/{FILE}")


def test_the_environment_puts_another_mirror_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with serving({FILE: PACKED}) as usual, serving({f"x/{FILE}": PACKED}) as other:
        monkeypatch.setenv("BSD_MIRROR", other.url("x"))
        builder = project(tmp_path / "a", usual.base, mirror_env="BSD_MIRROR", digests=KNOWN)
        builder.fetch()
        assert assert_fetched(builder).origin == other.url(f"x/{FILE}")
        assert not usual.asked
        assert help_table(builder.config)[-1][1:4] == ("BSD_MIRROR", other.url("x"), "environment BSD_MIRROR")


def test_two_versions_side_by_side(tmp_path: Path):
    other = b"CD001 another" * 5000
    files = {FILE: PACKED, "bsd-2.0_REL.iso.bz2": bz2.compress(other)}
    digests = {**KNOWN, "2.0": [digest(other, "content")]}
    with serving(files) as site:
        one = project(tmp_path / "a", site.base, digests=digests)
        one.fetch()
        two = project(tmp_path / "a", site.base, digests=digests, version="2.0")
        two.fetch()
        assert_fetched(one)
        assert_fetched(two, other)
        assert (one.installer_record.parent.name, two.installer_record.parent.name) == ("bsd-1.0", "bsd-2.0")
        for builder in (one, two):
            builder.fetch()
        assert len(site.asked) == 2


def test_an_installer_that_was_damaged_is_fetched_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with serving({FILE: PACKED}) as site:
        builder = project(tmp_path / "a", site.base, digests=KNOWN)
        builder.fetch()
        builder.installer().chmod(0o644)
        builder.installer().write_bytes(ISO[:-1])
        assert "bytes, its record says" in builder.why_stale("fetch")
        builder.fetch()
        assert_fetched(builder)
        assert len(site.asked) == 2
    assert "fetching it again" in capsys.readouterr().out


# -- the mirror's list of sums


SUMS = f"SHA1 ({FILE}) = {hashlib.sha1(PACKED).hexdigest()}\nMD5 ({FILE}) = {hashlib.md5(PACKED).hexdigest()}\n"  # noqa: S324


def test_the_list_of_sums_is_used_when_no_digest_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = {FILE: PACKED, "md5.txt": SUMS.encode()}
    with serving({}) as first, serving(files) as site:
        builder = project(tmp_path / "a", first.base, site.base, sums="md5.txt")
        builder.fetch()
        assert assert_fetched(builder).verified == site.url("md5.txt")
    said = capsys.readouterr().out
    assert f"no digest for version 1.0; its sha1 is taken from {site.url('md5.txt')}" in said


def test_a_list_of_sums_may_have_the_form_of_gnu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    listed = f"{hashlib.sha256(PACKED).hexdigest()} *{FILE}\n{hashlib.sha256(b'x').hexdigest()}  {FILE}.sig\n"
    with serving({FILE: PACKED, "SHA256SUMS": listed.encode()}) as site:
        builder = project(tmp_path / "a", site.base, sums="SHA256SUMS")
        builder.fetch()
        assert assert_fetched(builder).verified == site.url("SHA256SUMS")
    assert "its sha256 is taken from" in capsys.readouterr().out


def test_a_guest_without_a_version_is_not_told_of_one(tmp_path: Path):
    wanted = Release(name="x.iso", version="", folders=(str(tmp_path),), digests=(), sums="", known=(), size=None)
    with pytest.raises(FetchError, match="has none for this guest, which has no version") as caught:
        fetch.obtain(wanted, tmp_path, print)
    assert "check the version" not in caught.value.hint


def test_a_known_digest_is_believed_and_no_list(tmp_path: Path):
    with serving({FILE: PACKED, "md5.txt": b"MD5 (x) = 0"}) as site:
        builder = project(tmp_path / "a", site.base, sums="md5.txt", digests=KNOWN)
        builder.fetch()
        assert paths(site) == [FILE]


@pytest.mark.parametrize(
    ("listed", "match"),
    [
        (SUMS.replace("_REL", "_RC1"), "md5.txt does not list it"),
        (None, "md5.txt answered 404"),
        ("<html>log in</html>", "md5.txt sent an HTML page"),
        ("\n" * 1_000_001, "list of sums has more than"),
    ],
    ids=["another file", "absent", "a page", "endless"],
)
def test_lists_that_do_not_help(tmp_path: Path, listed: str | None, match: str):
    files = {FILE: PACKED} | ({} if listed is None else {"md5.txt": listed.encode()})
    with serving(files) as site:
        builder = project(tmp_path / "a", site.base, sums="md5.txt", digests={"0.9": KNOWN["1.0"]})
        error = refused(builder, match)
        assert error.message.startswith(f"no digest is known for {FILE}: guest.toml has none for version 1.0, and ")
        assert "digests are known for 0.9" in error.hint
        assert "--allow-unverified" in error.hint
        assert FILE not in paths(site)
        builder.fetch(allow_unverified=True)
        assert assert_fetched(builder).verified == ""


def test_a_list_that_says_another_digest_is_heeded_in_spite_of_the_flag(tmp_path: Path):
    wrong = f"MD5 ({FILE}) = {'0' * 32}\n".encode()
    with serving({FILE: PACKED, "md5.txt": wrong}) as site:
        builder = project(tmp_path / "a", site.base, sums="md5.txt")
        with pytest.raises(FetchError, match="not 00000000"):
            builder.fetch(allow_unverified=True)
        assert not builder.installer_record.exists()


# -- what is refused


def test_a_wrong_digest(tmp_path: Path):
    with serving({FILE: PACKED}) as site:
        builder = project(tmp_path / "a", site.base, digests={"1.0": [digest(b"x", "content")]})
        error = refused(builder, f"not {hashlib.sha256(b'x').hexdigest()}")
        assert error.message.startswith(f"{FILE} could not be fetched: {site.url(FILE)} has the sha256 ")


def test_a_version_that_no_mirror_has(tmp_path: Path):
    with serving({}) as first, serving({}) as second:
        builder = project(tmp_path / "a", first.base, second.base, digests=KNOWN)
        error = refused(builder, "answered 404")
        assert first.url(FILE) in error.message
        assert second.url(FILE) in error.message
        assert "check the version" in error.hint


def test_unverified_only_with_the_flag_and_for_each_project_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with serving({FILE: PACKED}) as site:
        builder = project(tmp_path / "a", site.base)
        assert "--allow-unverified" in refused(builder, f"no digest is known for {FILE}").hint
        assert not site.asked
        builder.fetch(allow_unverified=True)
        assert assert_fetched(builder).verified == ""
        assert "not verified: no digest is known" in capsys.readouterr().out
        builder.fetch()  # the user has said yes in this project
        other = project(tmp_path / "b", site.base)
        with pytest.raises(FetchError, match="no digest is known"):
            other.fetch()
        other.fetch(allow_unverified=True)
        assert_fetched(other)
        assert len(site.asked) == 1


def test_without_a_digest_another_mirror_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = b"CD001 another" * 5000
    with serving({FILE: PACKED}) as first, serving({FILE: bz2.compress(other)}) as second:
        builder = project(tmp_path / "a", first.base, mirror_env="BSD_MIRROR")
        builder.fetch(allow_unverified=True)
        monkeypatch.setenv("BSD_MIRROR", second.base)
        builder.fetch(allow_unverified=True)
        assert_fetched(builder, other)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"phase": {"packages": ["tcc"]}}, r"phases.packages = \['tcc'\]: an installer that is downloaded brings no"),
        ({"file": "bsd-{arch}.iso"}, r"installer.file = 'bsd-{arch}.iso': only {version} is replaced"),
        ({"file": "iso/bsd.iso"}, "installer.file = 'iso/bsd.iso': not a file's name"),
        ({"sums": "../md5.txt"}, r"installer.sums = '../md5.txt': not a file's name"),
        ({"mirrors": ["mirror.example/iso"]}, "installer.mirrors = 'mirror.example/iso': not an address"),
        ({"mirror_env": "BSD-MIRROR"}, "installer.mirror_env = 'BSD-MIRROR': not a variable's name"),
    ],
)
def test_what_the_configuration_is_refused_for(tmp_path: Path, keys: dict, says: str):
    with pytest.raises(ConfigError, match=rf"guest.toml: {says}") as caught:
        project(tmp_path / "a", *([] if "mirrors" in keys else [GONE]), **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["md5:12 of download", "sha256:" + "0" * 64, "crc:00 of content"])
def test_digests_that_cannot_be(tmp_path: Path, text: str):
    project(tmp_path / "a", GONE)
    file = tmp_path / "a/phases/bsd/guest.toml"
    file.write_text(file.read_text().replace("[[phases]]", f'[installer.digests]\n"1.0" = ["{text}"]\n\n[[phases]]'))
    with pytest.raises(ConfigError, match=r'installer.digests."1.0"\[0\] = .*: use .*HEX of download'):
        load(tmp_path / "a", {}, {"HOME": str(tmp_path)})


# -- as a task


def test_the_task_takes_the_flag_and_the_version(tmp_path: Path):
    other = b"CD001 another" * 5000
    with serving({FILE: PACKED, "bsd-2.0_REL.iso.bz2": bz2.compress(other)}) as site:
        one = project(tmp_path / "a", site.base, digests=KNOWN)
        two = project(tmp_path / "a", site.base, digests=KNOWN, version="2.0")
        (tmp_path / "a/dodo.py").write_text("from vmtasks.tasks import *  # noqa: F403\n")
        assert doit(one, "fetch") == 0
        assert doit(one, "version=2.0", "fetch") == 1
        assert doit(one, "version=2.0", "fetch", "--allow-unverified") == 0
        assert doit(one, "version=2.0", "fetch") == 0
        assert_fetched(one)
        assert assert_fetched(two, other).verified == ""
        assert len(site.asked) == 2


def doit(builder: Builder, *words: str) -> int:
    folders = [f"store={builder.store.root}", f"dir={builder.config.vm_dir}"]
    argv = [sys.executable, "-m", "doit", *folders, *words]
    return subprocess.run(argv, cwd=builder.config.root, timeout=60, check=False).returncode
