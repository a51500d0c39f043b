"""Downloads from a real server that cuts, stalls, lies and changes its mind; and what is left on disk afterwards."""

import bz2
import dataclasses
import gzip
import hashlib
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from httpserver import Reply, Site, serving
from vmtasks.errors import FetchError, StateError
from vmtasks.lock import lock
from vmtasks.media import decompress, transfer
from vmtasks.media.digest import Digest, parse_bsd_sums
from vmtasks.media.fetch import fetch
from vmtasks.media.meter import Meter
from vmtasks.media.want import Fetched, Limits, Want, stem

LIMITS = Limits(connect_s=2, stall_s=0.3, total_s=20, attempts=3, backoff_s=0.01, backoff_max_s=0.05)
PLAIN = random.Random(1).randbytes(400_000) + bytes(600_000)  # noqa: S311
PACKED = bz2.compress(PLAIN)
HTML = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"
NAME = "os.iso.bz2"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def of_download(data: bytes = PACKED, algorithm: str = "md5") -> Digest:
    return Digest(algorithm, hashlib.new(algorithm, data).hexdigest(), "download")


def of_content(data: bytes = PLAIN) -> Digest:
    return Digest("sha256", sha256(data))


def want(*sites: Site, name: str = NAME, digests: tuple[Digest, ...] | None = None, **more) -> Want:
    promised = (of_download(), of_content()) if digests is None else digests
    return Want(urls=tuple(site.url(name) for site in sites), name=name, digests=promised, **more)


def get(wanted: Want, folder: Path, **more) -> Fetched:
    return fetch(wanted, folder, **{"limits": LIMITS, **more})


def names(folder: Path, pattern: str = "*") -> list[str]:
    """What is left, but for the lock."""
    return sorted(path.name for path in folder.glob(pattern) if path.suffix not in {".lock", ".owner"})


def assert_whole(got: Fetched, folder: Path, plain: bytes = PLAIN) -> None:
    """The file is right, read-only, and nothing is beside it but its record."""
    assert got.path == folder / sha256(plain)
    assert (got.sha256, got.size) == (sha256(plain), len(plain))
    assert got.path.read_bytes() == plain
    assert got.path.stat().st_mode & 0o777 == 0o444
    assert names(folder) == [got.sha256, f"{got.sha256}.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


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
        gone = Want(urls=("http://127.0.0.1:9/x",), name=NAME, digests=digests)
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
    assert_whole(get(Want(urls=(url,), name=NAME, digests=(of_download(),)), folder), folder)
    assert source.read_bytes() == PACKED


def test_a_local_file_with_a_space_and_no_compression(folder: Path, tmp_path: Path):
    source = tmp_path / "my os.iso"
    source.write_bytes(PLAIN)
    url = f"file://{tmp_path}/my%20os.iso"
    assert_whole(get(Want(urls=(url,), name="os.iso", digests=(of_content(),)), folder), folder)
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
        wanted = Want(urls=(f"http://mirror.invalid/{NAME}",), name=NAME, digests=(of_download(),))
        assert_whole(get(wanted, folder), folder)


@pytest.mark.parametrize("proxy", ["socks9://127.0.0.1:1", "http://[::1"])
def test_unusable_proxy_variables_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch, proxy: str):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(FetchError, match="settings of the environment") as caught:
        get(Want(urls=("http://127.0.0.1:9/x",), name="x", digests=(of_content(),)), folder)
    assert "ALL_PROXY" in caught.value.hint


def test_redirects_are_followed_and_passwords_not_shown(folder: Path):
    with serving({NAME: PACKED}, Reply(302, location=f"/{NAME}", body=b"")) as site:
        url = site.url("old").replace("//", "//user:secret@")
        got = get(Want(urls=(url,), name=NAME, digests=(of_download(),)), folder)
        assert got.url == site.url("old")
    assert "secret" not in (folder / f"{got.sha256}.json").read_text()


# -- resuming


DATED = Reply(etag="", modified="Thu, 24 Jul 2025 10:00:00 GMT")


@pytest.mark.parametrize("reply", [Reply(), DATED, dataclasses.replace(DATED, etag='W/"weak"')])
def test_a_cut_connection_is_resumed(folder: Path, reply: Reply):
    cuts = [dataclasses.replace(reply, cut_after=count) for count in (100_000, 1, 200_000)]
    with serving({NAME: PACKED}, *cuts) as site:
        site.usual = reply
        assert_whole(get(want(site), folder), folder)
        assert [asked.range for asked in site.asked] == ["", "bytes=100000-", "bytes=100001-", "bytes=300001-"]
        assert {asked.if_range for asked in site.asked[1:]} == {reply.modified or reply.etag}
        assert site.sent == len(PACKED)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, len(PACKED)), max_size=4), name=st.sampled_from([NAME, "os.iso"]))
def test_cuts_anywhere_cost_no_byte_twice(cuts: list[int], name: str):
    served = PACKED if name == NAME else PLAIN
    patient = Limits(stall_s=2, attempts=9, backoff_s=0)
    with (
        tempfile.TemporaryDirectory() as place,
        serving({name: served}, *(Reply(cut_after=cut) for cut in cuts)) as site,
    ):
        assert_whole(get(want(site, name=name, digests=(of_content(),)), Path(place), limits=patient), Path(place))
        assert site.sent == len(served)


@pytest.mark.parametrize("name", [NAME, "os.iso"])
def test_a_later_run_resumes(folder: Path, name: str):
    served = PACKED if name == NAME else PLAIN
    with serving({name: served}, Reply(cut_after=250_000), *[Reply(503)] * 3) as site:
        wanted = want(site, name=name, digests=(of_content(),))
        with pytest.raises(FetchError, match="answered 503"):
            get(wanted, folder)
        assert [(folder / part).stat().st_size for part in names(folder, "*.part")] == [250_000]
        assert not names(folder, "*.unpacked")
        assert_whole(get(wanted, folder), folder)
        assert site.asked[-1].range == "bytes=250000-"
        assert site.sent == len(served)


def test_a_part_that_is_whole_needs_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with serving({NAME: PACKED}) as site:
        with monkeypatch.context() as patch:
            patch.setattr(transfer.Transfer, "_publish", stop)
            with pytest.raises(KeyboardInterrupt):
                get(want(site), folder)
        assert len(names(folder, "*.part")) == 1
        assert_whole(get(want(site), folder), folder)
        assert len(site.asked) == 1


def plant(folder: Path, wanted: Want, part: bytes, sidecar: str) -> None:
    """Leave what an earlier run might have left."""
    folder.mkdir(exist_ok=True)
    (folder / f"{stem(wanted)}.part").write_bytes(part)
    (folder / f"{stem(wanted)}.part.json").write_text(sidecar)


OURS = f'{{"url":"URL","validator":"\\"v1\\"","length":{len(PACKED)}}}'


@pytest.mark.parametrize("reply", [Reply(etag='"v2"'), Reply(etag='"v2"', heed_if_range=False), Reply(ranges=False)])
def test_another_version_is_never_appended(folder: Path, reply: Reply):
    """Also when the server sends the rest of the new file although If-Range names the old one."""
    with serving({NAME: PACKED}) as site:
        site.usual = reply
        plant(folder, want(site), PACKED[:250_000], OURS.replace("URL", site.url(NAME)))
        assert_whole(get(want(site), folder), folder)
        assert site.asked[0].range == "bytes=250000-"
        assert site.asked[0].if_range == '"v1"'
        assert site.asked[-1].sent == len(PACKED)


def test_a_rest_that_begins_elsewhere_is_not_appended(folder: Path):
    with serving({"os.iso": PLAIN}, Reply(cut_after=500_000), Reply(skipped=1, cut_after=0)) as site:
        assert_whole(get(want(site, name="os.iso", digests=(of_content(),)), folder), folder)
        assert [asked.range for asked in site.asked] == ["", "bytes=500000-", ""]


def test_the_etag_changes_between_two_attempts(folder: Path):
    with serving({NAME: PACKED}, Reply(body=PACKED[:300_000] + bytes(99), cut_after=200_000)) as site:
        site.usual = Reply(etag='"v2"')
        assert_whole(get(want(site), folder), folder)
        assert [asked.range for asked in site.asked] == ["", "bytes=200000-"]


@pytest.mark.parametrize(
    ("part", "sidecar"),
    [
        (PACKED[:9], ""),
        (PACKED[:9], "{"),
        (PACKED[:9], '{"url":"http://elsewhere/x","validator":"\\"v1\\"","length":9}'),
        (PACKED[:9], '{"url":"URL","validator":"","length":null}'),
        (b"", OURS),
        (PACKED + b"more", OURS),
    ],
    ids=["no sidecar", "damaged sidecar", "another URL", "no validator", "empty", "too long"],
)
def test_a_part_that_cannot_be_believed_is_not_used(folder: Path, part: bytes, sidecar: str):
    with serving({NAME: PACKED}) as site:
        plant(folder, want(site), part, sidecar.replace("URL", site.url(NAME)))
        assert_whole(get(want(site), folder), folder)
        assert [asked.range for asked in site.asked] == [""]


@pytest.mark.parametrize("length", [250_000, len(PACKED)])
@pytest.mark.parametrize("name", [NAME, "os.iso"])
def test_a_part_with_wrong_bytes_is_dropped_and_fetched_once_more(folder: Path, name: str, length: int):
    """As after a power cut: the size is right and the bytes are not."""
    served = (PACKED if name == NAME else PLAIN)[: len(PACKED)]
    with serving({name: served}) as site:
        wanted = want(site, name=name, digests=(of_content(PLAIN if name == NAME else served),))
        plant(folder, wanted, served[:1000] + bytes(length - 1000), OURS.replace("URL", site.url(name)))
        assert_whole(get(wanted, folder), folder, PLAIN if name == NAME else served)
        assert site.asked[-1].range == ""


def test_a_server_without_ranges_or_validator_starts_over(folder: Path):
    with serving({NAME: PACKED}, Reply(cut_after=250_000, etag=""), Reply(cut_after=260_000, ranges=False)) as site:
        site.usual = Reply(ranges=False)
        assert_whole(get(want(site), folder), folder)
        assert [asked.range for asked in site.asked] == ["", "", "bytes=260000-"]
        assert site.sent == 250_000 + 260_000 + len(PACKED)


def test_an_end_that_nobody_announced_is_not_taken_for_the_end(folder: Path):
    with serving({NAME: PACKED}, Reply(announce_length=False, cut_after=250_000)) as site:
        site.usual = Reply(announce_length=False)
        assert_whole(get(want(site), folder), folder)


PROGRAM = """
import sys, pathlib
from vmtasks.media.digest import Digest
from vmtasks.media.fetch import fetch
from vmtasks.media.want import Want
url, name, hex, folder = sys.argv[1:]
fetch(Want(urls=(url,), name=name, digests=(Digest("sha256", hex),)), pathlib.Path(folder))
"""


def test_killed_in_the_middle_then_resumed(folder: Path):
    with serving({NAME: PACKED}, Reply(pause_s=0.02, chunk=8192)) as site:
        wanted = want(site, digests=(of_content(),))
        argv = [sys.executable, "-c", PROGRAM, site.url(NAME), NAME, sha256(PLAIN), str(folder)]
        part = folder / f"{stem(wanted)}.part"
        with subprocess.Popen(argv) as process:
            wait_until(lambda: part.exists() and part.stat().st_size > 100_000)
            process.send_signal(signal.SIGKILL)
        here = part.stat().st_size
        assert 100_000 < here < len(PACKED)
        assert not re.search("^[0-9a-f]{64}$", "\n".join(names(folder)), re.MULTILINE)
        assert_whole(get(wanted, folder), folder)
        assert site.asked[-1].range == f"bytes={here}-"
        assert site.asked[-1].sent == len(PACKED) - here


def wait_until(holds: Callable[[], bool], deadline_s: float = 10) -> None:
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.005)


# -- what must not be taken for the file


def flipped(data: bytes) -> bytes:
    return data[:-50] + bytes([data[-50] ^ 1]) + data[-49:]


BAD_ANSWERS = {
    "404": (Reply(404), "answered 404 Not Found"),
    "403": (Reply(403), "answered 403"),
    "206 that nobody asked for": (Reply(206), "answered 206"),
    "5xx for ever": (Reply(502), r"answered 502 Bad Gateway \(3 attempts\)"),
    "HTML by its type": (Reply(body=PACKED, content_type="text/html; charset=utf-8"), "HTML page"),
    "HTML by its bytes": (Reply(body=HTML), "HTML page"),
    "HTML in drops": (Reply(body=HTML, chunk=1, pause_s=0.001), "HTML page"),
    "another file": (Reply(body=bz2.compress(b"another")), "has the md5 [0-9a-f]{32} .download., not [0-9a-f]{32}"),
    "empty": (Reply(body=b""), "is empty"),
    "not bz2": (Reply(body=bytes(5000)), "is not, or is damaged, bz2 data"),
    "damaged": (Reply(body=flipped(PACKED)), "is not, or is damaged, bz2 data"),
    "truncated on the server": (Reply(body=PACKED[:-1]), "ends in the middle of its bz2 data"),
    "trailing garbage": (Reply(body=PACKED + b"garbage"), "has other bytes after the end of its bz2 data"),
    "truncated second stream": (Reply(body=PACKED + PACKED[:99]), "ends in the middle"),
    "redirect loop": (Reply(302, location=f"/{NAME}"), "redirects in a circle"),
    "redirect to nowhere": (Reply(302, location="gopher://x/y"), "failed: .*gopher"),
    "cut before the first byte, for ever": (Reply(cut_after=0), r"failed: .*\(3 attempts\)"),
    "stalls for ever": (Reply(stall_after=0), r"sent nothing for 0.3 s \(3 attempts\)"),
}


@pytest.mark.parametrize(("reply", "message"), BAD_ANSWERS.values(), ids=list(BAD_ANSWERS))
def test_a_bad_answer_is_an_error_and_leaves_nothing(folder: Path, reply: Reply, message: str):
    with serving({NAME: PACKED}) as site:
        site.usual = reply
        with pytest.raises(FetchError, match=message) as caught:
            get(want(site), folder)
        assert f"{NAME} could not be had: {site.url(NAME)} " in caught.value.message
        assert caught.value.hint
        assert not [name for name in names(folder) if not name.endswith((".part", ".part.json"))]
        for part in names(folder, "*.part"):  # nothing was received, or nothing was wrong with it
            assert (folder / part).read_bytes() == b""


@pytest.mark.parametrize(
    "promise", [of_download(b"x"), of_download(b"x", "sha256"), of_content(b"x"), Digest("md5", "0" * 32)]
)
@pytest.mark.parametrize("name", [NAME, "os.iso"])
def test_a_wrong_digest_of_any_kind(folder: Path, name: str, promise: Digest):
    with serving({name: PACKED if name == NAME else PLAIN}) as site:
        with pytest.raises(FetchError, match=f"not {promise.hex}"):
            get(want(site, name=name, digests=(promise,)), folder)
        assert len(site.asked) == 1, "an answer that came in one piece is not asked for again"
        assert names(folder) == []


def test_bad_local_files(folder: Path, tmp_path: Path):
    (tmp_path / "page.iso").write_bytes(HTML)
    os.mkfifo(tmp_path / "fifo")
    urls = (f"{tmp_path}/absent", str(tmp_path), f"{tmp_path}/fifo", "file://host/x", f"{tmp_path}/page.iso")
    with pytest.raises(FetchError) as caught:
        get(Want(urls=urls, name="x.iso", digests=(of_content(),)), folder)
    for said in ("No such file", "not a regular file", "on another machine", "HTML page"):
        assert said in caught.value.message
    assert names(folder) == []


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/x", "http://nowhere.invalid/x", "http://[", "ftp://x/y", "http://"]
)
def test_what_cannot_be_reached(folder: Path, url: str):
    with pytest.raises(FetchError, match="failed") as caught:
        get(Want(urls=(url,), name="x.iso", digests=(of_content(),)), folder)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "new\nline/"])
def test_names_that_are_paths(folder: Path, name: str):
    with pytest.raises(FetchError, match="not the name of a file"):
        get(Want(urls=("/x",), name=name, digests=(of_content(),)), folder)


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


def test_a_part_is_finished_where_it_came_from(folder: Path):
    """A URL further down the list goes first when bytes of it are here; otherwise the order counts."""
    with serving({NAME: PACKED}) as first, serving({NAME: PACKED}) as second:
        plant(folder, want(first, second), PACKED[:250_000], OURS.replace("URL", second.url(NAME)))
        assert_whole(get(want(first, second), folder), folder)
        assert not first.asked
        assert second.sent == len(PACKED) - 250_000


def test_no_mirror_continues_what_another_began(folder: Path):
    with serving({NAME: PACKED}, Reply(cut_after=250_000)) as first, serving({NAME: PACKED}) as second:
        first.usual = Reply(404)
        assert_whole(get(want(first, second), folder), folder)
        assert [asked.range for asked in second.asked] == [""]


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


def _lock(folder: Path, wanted: Want) -> Path:
    folder.mkdir()
    return folder / f"{stem(wanted)}.lock"


# -- the disk


def test_space_is_checked_before_the_bytes_come(small_disk: Path):
    body = random.Random(2).randbytes(20_000_000)  # noqa: S311 - more than socket buffers hold
    with serving({"os.iso": body}) as site:
        with pytest.raises(FetchError, match=r"needs about 20\.0 MB in .*, where 1\.0 MB are free") as caught:
            get(want(site, name="os.iso", digests=(of_content(body),)), small_disk)
        assert "VMTASKS_STORE" in caught.value.hint
        assert site.sent < len(body)
    assert names(small_disk) == []


def test_the_known_size_of_the_content_counts(small_disk: Path):
    with serving({NAME: PACKED}) as site, pytest.raises(FetchError, match=r"needs about 5\.\d MB") as caught:
        get(want(site, size=5_000_000), small_disk)
    assert "guess" not in caught.value.hint


@pytest.mark.parametrize(("name", "count"), [("zeros.iso.bz2", 8_000_000), ("os.iso", 3_000_000)])
def test_a_disk_that_fills_up_in_the_middle(small_disk: Path, name: str, count: int):
    """What is not announced (growth beyond all guesses, no length) is found out while writing."""
    plain = bytes(count)
    body = bz2.compress(plain) if name.endswith("bz2") else plain
    with serving({name: body}) as site:
        site.usual = Reply(announce_length=False)
        with pytest.raises(FetchError, match=r"could not be stored in .*: the disk is full") as caught:
            get(want(site, name=name, digests=(of_content(plain),)), small_disk)
        assert caught.value.hint.startswith("free some space")
    assert not [left for left in names(small_disk) if not left.endswith((".part", ".part.json"))]


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match=r"could not be stored in .*Not a directory"):
        get(Want(urls=("/x",), name="x", digests=(of_content(),)), tmp_path / "file" / "below")


# -- progress, and pure parts


def test_progress_starts_at_what_is_here_and_ends_at_all(folder: Path):
    seen: list[tuple[int, int | None]] = []
    with serving({NAME: PACKED}) as site:
        plant(folder, want(site), PACKED[:250_000], OURS.replace("URL", site.url(NAME)))
        get(want(site), folder, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (250_000, len(PACKED))
    assert seen[-1] == (len(PACKED), len(PACKED))
    assert seen == sorted(seen)


def test_an_interrupt_in_the_middle_leaves_a_part(folder: Path):
    def stop(done: int, _: int | None) -> None:
        if done > 200_000:
            raise KeyboardInterrupt

    before = threading.active_count()
    with serving({NAME: PACKED}) as site:
        with pytest.raises(KeyboardInterrupt):
            get(want(site), folder, progress=stop)
        assert not names(folder, "*.unpacked")
        wait_until(lambda: threading.active_count() <= before + 2)  # the server's own
        assert_whole(get(want(site), folder), folder)
        assert site.asked[-1].range.startswith("bytes=2")


def test_the_meter_says_rate_and_time_left_not_too_often():
    said: list[str] = []
    clock = [0.0]
    meter = Meter(said.append, every_s=1, clock=lambda: clock[0])
    for second in range(21):  # 5 MB/s, told twice a second
        clock[0] = second / 2
        meter(60_000_000 + second * 2_500_000, 260_000_000)
    assert len(said) == 11
    assert said[0] == "60.0 of 260.0 MB (23 %)"
    assert said[-1] == "110.0 of 260.0 MB (42 %), 5.0 MB/s, 30 s left"
    meter(0, None)
    assert said[-1] == "0.0 MB"
    clock[0] += 0.5
    meter(10_000_000, 10_000_000)
    assert said[-1] == "10.0 of 10.0 MB (100 %), 20.0 MB/s"


COMPRESSORS = {"bz2": bz2.compress, "gz": gzip.compress, "xz": lzma.compress}


@settings(max_examples=60, deadline=None)
@given(
    packing=st.sampled_from(sorted(COMPRESSORS)),
    streams=st.lists(st.binary(max_size=3000), min_size=1, max_size=4),
    step=st.integers(1, 400),
)
def test_streams_in_blocks_of_any_size(packing: str, streams: list[bytes], step: int):
    packed = b"".join(map(COMPRESSORS[packing], streams))
    unpacker = decompress.Unpacker(packing)
    plain = b"".join(part for at in range(0, len(packed), step) for part in unpacker.feed(packed[at : at + step]))
    unpacker.finish()
    assert plain == b"".join(streams)


@pytest.mark.parametrize("packing", sorted(COMPRESSORS))
def test_a_small_input_with_a_huge_content_comes_in_bounded_blocks(packing: str):
    plain = bytes(9_000_001)
    unpacker = decompress.Unpacker(packing)
    sizes = [len(block) for block in unpacker.feed(COMPRESSORS[packing](plain))]
    unpacker.finish()
    assert sum(sizes) == len(plain)
    assert max(sizes) <= decompress.BLOCK


@given(
    st.dictionaries(
        st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9 ()=._-]{0,30}", fullmatch=True), st.binary(min_size=16, max_size=16)
    )
)
def test_bsd_sums(sums: dict[str, bytes]):
    lines = [f"MD5 ({name}) = {digest.hex()}" for name, digest in sums.items()]
    text = "\r\n".join(["a heading", *lines, "SHA256 (x) = 00", "MD5 (short) = 00", ""])
    assert parse_bsd_sums(text) == {name: digest.hex() for name, digest in sums.items()}


def test_bsd_sums_that_contradict_each_other():
    with pytest.raises(FetchError, match="two different digests for a"):
        parse_bsd_sums(f"MD5 (a) = {'0' * 32}\nMD5 (a) = {'1' * 32}\n")


@pytest.mark.parametrize(
    ("algorithm", "digits"), [("md5", "0" * 31), ("sha256", "g" * 64), ("crc32", "0" * 8), ("md5", "")]
)
def test_digests_that_cannot_be(algorithm: str, digits: str):
    with pytest.raises(ValueError, match="not the hexadecimal form"):
        Digest(algorithm, digits)
    assert Digest("md5", "A" * 32) == Digest("md5", "a" * 32)
