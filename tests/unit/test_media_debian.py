import shutil
from pathlib import Path

import debs
import pytest

from vmtasks.errors import FetchError
from vmtasks.host import files
from vmtasks.installer.compose import debian
from vmtasks.installer.compose.unpack import unpack
from vmtasks.media.tree import Entry

pytestmark = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is not installed")

SHELL = debs.Deb(
    "shell",
    entries=[
        Entry("bin", "dir", 0o755),
        Entry("bin/sh", "file", 0o4755, b"#!shell"),
        Entry("bin/ash", "link", 0o777, target="sh"),
        Entry("tmp", "dir", 0o1777),
    ],
    hard={"bin/bash": "bin/sh"},
    fields={"Pre-Depends": "libc (>= 2)", "Depends": "pager | reader, tool:any"},
)


def index(tmp_path, packages):
    return debian.Apt(tmp_path / "cache", debs.publish(tmp_path / "archive", packages)).index()


def names(packages):
    return [package.name for package in packages]


def base(*more):
    return [
        SHELL,
        debs.Deb("libc", "2.36"),
        debs.Deb("less", fields={"Provides": "pager (= 1), viewer"}),
        debs.Deb("reader"),
        debs.Deb("tool", fields={"Depends": "shell"}),
        *more,
    ]


def test_loops_end_and_the_first_real_alternative_wins_unless_another_is_wanted(tmp_path):
    known = index(tmp_path, base())
    assert names(debian.resolve(known, ["shell"])) == ["libc", "reader", "shell", "tool"]
    assert names(debian.resolve(known, ["shell", "less"])) == ["less", "libc", "shell", "tool"]


def test_virtual_package_alone(tmp_path):
    known = index(tmp_path, [*base(), debs.Deb("app", fields={"Depends": "viewer"})])
    assert names(debian.resolve(known, ["app"])) == ["app", "less"]


def test_omitted_packages_take_what_only_they_need_with_them(tmp_path):
    known = index(tmp_path, base())
    assert names(debian.resolve(known, ["shell"], ["reader", "tool"])) == ["libc", "shell"]
    assert names(debian.resolve(known, ["shell"], ["pager", "tool"])) == ["libc", "shell"]


def test_highest_version_is_taken(tmp_path):
    known = index(tmp_path, [debs.Deb("libc", "2.9"), debs.Deb("libc", "2.36"), debs.Deb("libc", "2.36~rc1")])
    assert debian.resolve(known, ["libc"])[0].version == "2.36"


def test_unknown_package_is_named_with_who_wants_it(tmp_path):
    known = index(tmp_path, [debs.Deb("app", fields={"Depends": "absent"})])
    with pytest.raises(FetchError, match="no package absent, which app depends on"):
        debian.resolve(known, ["app"])
    with pytest.raises(FetchError, match="no package other in the archive"):
        debian.resolve(known, ["other"])


def test_download_checks_keeps_and_works_offline(tmp_path):
    archive = tmp_path / "archive"
    apt = debian.Apt(tmp_path / "cache", debs.publish(archive, [debs.Deb("libc", "1:2.36")]))
    wanted = debian.resolve(apt.index(), ["libc"])
    (path,) = apt.download(wanted)
    assert path.name == "libc_1%3a2.36_amd64.deb"
    assert files.sha256(path) == wanted[0].sha256
    shutil.rmtree(archive)
    assert apt.download(debian.resolve(apt.index(), ["libc"])) == [path]
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    with pytest.raises(FetchError, match="libc"):
        apt.download(wanted)


def test_package_that_is_not_what_the_list_promises_is_refused(tmp_path):
    apt = debian.Apt(tmp_path / "cache", debs.publish(tmp_path / "archive", [debs.Deb("libc")]))
    wanted = debian.resolve(apt.index(), ["libc"])
    changed = bytearray((tmp_path / "archive/pool/libc_1.0_amd64.deb").read_bytes())
    changed[-20] ^= 1
    (tmp_path / "archive/pool/libc_1.0_amd64.deb").write_bytes(changed)
    with pytest.raises(FetchError, match=r"libc.*"):
        apt.download(wanted)
    assert not list((tmp_path / "cache").rglob("*.deb"))


def test_archive_that_is_not_there(tmp_path):
    apt = debian.Apt(tmp_path / "cache", debian.Archive(f"file:{tmp_path}/none", "test", "", None))
    with pytest.raises(FetchError, match="package lists") as caught:
        apt.index()
    assert debian.MIRROR_VARIABLE in caught.value.hint


def test_older_lists_serve_when_the_archive_is_gone(tmp_path, monkeypatch):
    apt = debian.Apt(tmp_path / "cache", debs.publish(tmp_path / "archive", [debs.Deb("libc")]))
    apt.index()
    shutil.rmtree(tmp_path / "archive")
    monkeypatch.setattr(debian, "FRESH_S", 0.0)
    assert names(debian.resolve(apt.index(), ["libc"])) == ["libc"]


def test_missing_keyring_is_said_before_anything_is_fetched(tmp_path):
    apt = debian.Apt(tmp_path, debian.Archive(keyring=tmp_path / "none.gpg"))
    with pytest.raises(FetchError, match="is missing") as caught:
        apt.update()
    assert "debian-archive-keyring" in caught.value.hint


def test_environment_names_mirrors(monkeypatch):
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://a/debian")
    assert debian.Archive().here() == debian.Archive("http://a/debian")
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://a/debian http://a/security")
    assert debian.Archive().here() == debian.Archive("http://a/debian", security="http://a/security")


def test_unpack_keeps_modes_and_links_and_is_cached(tmp_path):
    deb = tmp_path / "shell.deb"
    deb.write_bytes(SHELL.bytes())
    first = unpack(deb, "digest", tmp_path)
    found = {entry.path: entry for entry in first}
    assert found["bin/sh"].mode == 0o4755
    assert found["bin/sh"].read() == found["bin/bash"].read() == b"#!shell"
    assert (found["bin/ash"].kind, found["bin/ash"].target) == ("link", "sh")
    assert found["tmp"].mode == 0o1777
    deb.unlink()
    assert unpack(deb, "digest", tmp_path) == first


def test_unpack_of_something_else(tmp_path):
    deb = tmp_path / "x.deb"
    deb.write_bytes(b"not an archive")
    with pytest.raises(FetchError, match="not a Debian package"):
        unpack(deb, "digest", tmp_path)
    deb.write_bytes(SHELL.bytes()[:-60])
    with pytest.raises(FetchError, match="not a Debian package"):
        unpack(deb, "digest", tmp_path)
    assert not (tmp_path / "unpacked/digest").exists()


def test_host_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"apt-get.*not installed") as caught:
        debian.Apt(tmp_path, debian.Archive(keyring=None)).index()
    assert "debian-archive-keyring" in caught.value.hint


def test_a_full_disk_is_not_blamed_on_the_network(full_disk: Path, tmp_path: Path) -> None:
    (full_disk / "ballast").write_bytes(b"x" * (32 << 10))
    assert "free some space" in debian.lost_hint(full_disk)
    assert "is the network up" in debian.lost_hint(tmp_path)
