"""Downloads that were cut, killed or interrupted in the middle, and what of them may be continued."""

import dataclasses
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
from downloads import NAME, PACKED, PLAIN, assert_whole, get, names, of_content, sha256, want
from hypothesis import given, settings
from hypothesis import strategies as st

from httpserver import Reply, serving
from vmtasks.errors import FetchError
from vmtasks.installer.download import transfer
from vmtasks.installer.download.want import Limits, WantedFile

pytestmark = pytest.mark.usefixtures("no_proxy")


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


def plant(folder: Path, wanted: WantedFile, part: bytes, sidecar: str) -> None:
    """Leave what an earlier run might have left."""
    folder.mkdir(exist_ok=True)
    (folder / f"{wanted.stem}.part").write_bytes(part)
    (folder / f"{wanted.stem}.part.json").write_text(sidecar)


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


def test_progress_starts_at_what_is_here_and_ends_at_all(folder: Path):
    seen: list[tuple[int, int | None]] = []
    with serving({NAME: PACKED}) as site:
        plant(folder, want(site), PACKED[:250_000], OURS.replace("URL", site.url(NAME)))
        get(want(site), folder, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (250_000, len(PACKED))
    assert seen[-1] == (len(PACKED), len(PACKED))
    assert seen == sorted(seen)


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


# -- killed, or interrupted, in the middle


PROGRAM = """
import sys, pathlib
from vmtasks.installer.download.want import Digest
from vmtasks.installer.download.fetch import fetch
from vmtasks.installer.download.want import WantedFile
url, name, hex, folder = sys.argv[1:]
fetch(WantedFile(urls=(url,), name=name, digests=(Digest("sha256", hex),)), pathlib.Path(folder))
"""


def test_killed_in_the_middle_then_resumed(folder: Path):
    with serving({NAME: PACKED}, Reply(pause_s=0.02, chunk=8192)) as site:
        wanted = want(site, digests=(of_content(),))
        argv = [sys.executable, "-c", PROGRAM, site.url(NAME), NAME, sha256(PLAIN), str(folder)]
        part = folder / f"{wanted.stem}.part"
        with subprocess.Popen(argv) as process:
            wait_until(lambda: part.exists() and part.stat().st_size > 100_000)
            process.send_signal(signal.SIGKILL)
        here = part.stat().st_size
        assert 100_000 < here < len(PACKED)
        assert not re.search("^[0-9a-f]{64}$", "\n".join(names(folder)), re.MULTILINE)
        assert_whole(get(wanted, folder), folder)
        assert site.asked[-1].range == f"bytes={here}-"
        assert site.asked[-1].sent == len(PACKED) - here


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


def wait_until(holds: Callable[[], bool], deadline_s: float = 10) -> None:
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.005)
