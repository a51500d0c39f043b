"""What a download refuses: servers that lie, names and digests that are wrong, disks that are full."""

import bz2
import os
import random
from pathlib import Path

import pytest
from downloads import HTML, NAME, PACKED, PLAIN, get, names, of_content, of_download, want

from httpserver import Reply, serving
from vmtasks.errors import FetchError
from vmtasks.installer.download.want import Digest, WantedFile

pytestmark = pytest.mark.usefixtures("no_proxy")


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
        assert f"{NAME} could not be fetched: {site.url(NAME)} " in caught.value.message
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
        get(WantedFile(urls=urls, name="x.iso", digests=(of_content(),)), folder)
    for said in ("No such file", "not a regular file", "on another machine", "HTML page"):
        assert said in caught.value.message
    assert names(folder) == []


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/x", "http://nowhere.invalid/x", "http://[", "ftp://x/y", "http://"]
)
def test_what_cannot_be_reached(folder: Path, url: str):
    with pytest.raises(FetchError, match="failed") as caught:
        get(WantedFile(urls=(url,), name="x.iso", digests=(of_content(),)), folder)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "new\nline/"])
def test_names_that_are_paths(folder: Path, name: str):
    with pytest.raises(FetchError, match="not the name of a file"):
        get(WantedFile(urls=("/x",), name=name, digests=(of_content(),)), folder)


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
        get(WantedFile(urls=("/x",), name="x", digests=(of_content(),)), tmp_path / "file" / "below")
