"""Downloads from a real server, and from mirrors that fail, stall or are slow; and what is left on disk afterwards."""

import bz2
import gzip
import hashlib
import lzma
import os
import threading
import time
from pathlib import Path

import pytest
from downloads import HTML, NAME, PACKED, PLAIN, assert_whole, get, names, of_content, of_download, sha256, want

from httpserver import Reply, serving
from vmtasks.errors import FetchError, StateError
from vmtasks.host.locks import lock
from vmtasks.installer.download.want import Digest, Fetched, Limits, WantedFile

pytestmark = pytest.mark.usefixtures("no_proxy")


# -- what works


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("os.iso", PLAIN),
        ("os.iso.bz2", PACKED),
        ("pbzip2.iso.bz2", bz2.compress(PLAIN[:300_000]) + bz2.compress(b"") + bz2.compress(PLAIN[300_000:])),
        ("os.iso.gz", gzip.compress(PLAIN)),
        ("padded.iso.gz", gzip.compress(PLAIN[:9]) + gzip.compress(PLAIN[9:]) + bytes(512)),
        ("os.iso.xz", lzma.compress(PLAIN)),
        ("padded.iso.xz", lzma.compress(PLAIN[:9]) + bytes(8) + lzma.compress(PLAIN[9:])),
    ],
)
def test_each_compression_ends_as_its_content(folder: Path, name: str, packed: bytes):
    digests = (of_content(), of_download(packed), of_download(packed, "sha256"))
    with serving({name: packed}) as site:
        got = get(want(site, name=name, digests=digests), folder)
        assert_whole(got, folder)
        assert got.verified
        assert got.url == site.url(name)
        assert site.sent == len(packed)


@pytest.mark.parametrize("digests", [(of_content(),), (of_download(),), (of_download(), of_content())])
def test_a_second_fetch_needs_no_network(folder: Path, digests: tuple[Digest, ...]):
    with serving({NAME: PACKED}) as site:
        get(want(site), folder)
        mtime = (folder / sha256(PLAIN)).stat().st_mtime_ns
        gone = WantedFile(urls=("http://127.0.0.1:9/x",), name=NAME, digests=digests)
        again = get(gone, folder)
        assert len(site.asked) == 1
    assert_whole(again, folder)
    assert again.verified
    assert again.path.stat().st_mtime_ns == mtime


def test_a_published_file_that_was_damaged_is_fetched_again(folder: Path):
    with serving({NAME: PACKED}) as site:
        path = get(want(site), folder).path
        path.chmod(0o644)
        path.write_bytes(PLAIN[:-1])
        assert_whole(get(want(site), folder), folder)
        assert len(site.asked) == 2


def test_the_same_content_by_another_name_leaves_the_published_file_alone(folder: Path):
    with serving({NAME: PACKED, "os.iso": PLAIN}) as site:
        before = get(want(site), folder).path.stat()
        got = get(want(site, name="os.iso", digests=(Digest("md5", hashlib.md5(PLAIN).hexdigest()),)), folder)  # noqa: S324
        assert_whole(got, folder)
        assert (got.path.stat().st_ino, got.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("form", ["{path}", "file://{path}", "file://localhost{path}"])
def test_local_files(folder: Path, tmp_path: Path, form: str):
    source = tmp_path / NAME
    source.write_bytes(PACKED)
    url = form.format(path=source)
    assert_whole(get(WantedFile(urls=(url,), name=NAME, digests=(of_download(),)), folder), folder)
    assert source.read_bytes() == PACKED


def test_a_local_file_with_a_space_and_no_compression(folder: Path, tmp_path: Path):
    source = tmp_path / "my os.iso"
    source.write_bytes(PLAIN)
    url = f"file://{tmp_path}/my%20os.iso"
    assert_whole(get(WantedFile(urls=(url,), name="os.iso", digests=(of_content(),)), folder), folder)
    assert source.stat().st_mode & 0o777 != 0o444


def test_without_a_digest_only_if_that_is_allowed(folder: Path):
    with serving({NAME: PACKED}) as site:
        with pytest.raises(FetchError, match=r"no digest is known for os\.iso\.bz2") as caught:
            get(want(site, digests=()), folder)
        assert "--allow-unverified" in caught.value.hint
        assert not site.asked
        got = get(want(site, digests=()), folder, allow_unverified=True)
        assert_whole(got, folder)
        assert not got.verified


def test_proxy_variables_are_respected(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with serving({NAME: PACKED}) as site:
        monkeypatch.setenv("http_proxy", site.base)
        wanted = WantedFile(urls=(f"http://mirror.invalid/{NAME}",), name=NAME, digests=(of_download(),))
        assert_whole(get(wanted, folder), folder)


@pytest.mark.parametrize("proxy", ["socks9://127.0.0.1:1", "http://[::1"])
def test_unusable_proxy_variables_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch, proxy: str):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(FetchError, match="settings of the environment") as caught:
        get(WantedFile(urls=("http://127.0.0.1:9/x",), name="x", digests=(of_content(),)), folder)
    assert "ALL_PROXY" in caught.value.hint


def test_redirects_are_followed_and_passwords_not_shown(folder: Path):
    with serving({NAME: PACKED}, Reply(302, location=f"/{NAME}", body=b"")) as site:
        url = site.url("old").replace("//", "//user:secret@")
        got = get(WantedFile(urls=(url,), name=NAME, digests=(of_download(),)), folder)
        assert got.url == site.url("old")
    assert "secret" not in (folder / f"{got.sha256}.json").read_text()


# -- mirrors, retries, deadlines


def test_the_next_mirror_is_used_and_an_error_names_all(folder: Path):
    with serving({}) as absent, serving({NAME: HTML}) as page, serving({NAME: PACKED}) as good:
        with pytest.raises(FetchError) as caught:
            get(want(absent, page), folder)
        for said in (absent.url(NAME), "404", page.url(NAME), "HTML"):
            assert said in caught.value.message
        got = get(want(absent, page, good), folder)
        assert_whole(got, folder)
        assert got.url == good.url(NAME)


def test_errors_that_pass_are_retried(folder: Path):
    with serving({NAME: PACKED}, Reply(500), Reply(429, retry_after="0"), Reply(stall_after=70_000)) as site:
        assert_whole(get(want(site), folder), folder)
        assert site.asked[-1].range == "bytes=70000-"


def test_retry_after_is_heeded(folder: Path):
    with serving({NAME: PACKED}, Reply(503, retry_after="1")) as site:
        begun = time.monotonic()
        assert_whole(get(want(site), folder), folder)
        assert time.monotonic() - begun >= 1


def test_attempts_count_anew_after_progress(folder: Path):
    """A line that breaks often still brings the file: there are more cuts than attempts."""
    with serving({NAME: PACKED}, *[Reply(cut_after=50_000)] * 7) as site:
        assert_whole(get(want(site), folder), folder)


def test_the_deadline_holds_for_a_server_that_drips(folder: Path):
    with serving({NAME: PACKED}) as site:
        site.usual = Reply(chunk=1000, pause_s=0.05)
        with pytest.raises(FetchError, match=r"was not here after 0\.5 s") as caught:
            get(want(site), folder, limits=Limits(stall_s=5, total_s=0.5))
        assert "what has arrived is kept" in caught.value.hint
        assert len(names(folder, "*.part")) == 1


def test_two_at_once_fetch_once(folder: Path):
    said: list[str] = []
    with serving({NAME: PACKED}, Reply(pause_s=0.02)) as site:
        results: list[Fetched] = []
        one = threading.Thread(target=lambda: results.append(get(want(site), folder, waiting=said.append)))
        two = threading.Thread(target=lambda: results.append(get(want(site), folder, waiting=said.append)))
        for thread in (one, two):
            thread.start()
        for thread in (one, two):
            thread.join()
        assert len(site.asked) == 1
    assert len(results) == 2
    assert_whole(results[0], folder)
    assert [line.partition(" is fetching it")[2] for line in said] == ["; waiting"]


def test_waiting_for_another_has_a_deadline(folder: Path):
    with serving({NAME: PACKED}) as site, lock(_lock(folder, want(site)), NAME, timeout_s=0):
        with pytest.raises(StateError, match=f"{NAME} is locked by process {os.getpid()}"):
            get(want(site), folder, limits=Limits(total_s=0.2))
        assert not site.asked


def _lock(folder: Path, wanted: WantedFile) -> Path:
    folder.mkdir()
    return folder / f"{wanted.stem}.lock"
