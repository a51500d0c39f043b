import gzip
import shutil

import pytest

from vmtasks.host import process
from vmtasks.installer.compose import cpio
from vmtasks.media.tree import Entry

ENTRIES = [
    Entry("bin/sh", "file", 0o755, b"#!" + bytes(range(256))),
    Entry("bin/a", "link", 0o777, target="sh"),
    Entry("tmp", "dir", 0o1777),
    Entry("odd", "file", 0o600, b"x"),
    Entry("empty", "file", 0o644),
]


@pytest.mark.skipif(shutil.which("bsdtar") is None, reason="bsdtar is not installed")
def test_read_back(tmp_path):
    packed = tmp_path / "a.gz"
    packed.write_bytes(cpio.archive(ENTRIES))
    listed = process.run(["bsdtar", "tvf", packed], timeout_s=10).stdout.splitlines()
    seen = {line.split()[8]: line.split()[0] for line in listed}
    assert seen == {
        "bin": "drwxr-xr-x",
        "bin/a": "lrwxrwxrwx",
        "bin/sh": "-rwxr-xr-x",
        "empty": "-rw-r--r--",
        "odd": "-rw-------",
        "tmp": "drwxrwxrwt",
    }
    process.run(["bsdtar", "xf", packed, "-C", tmp_path], timeout_s=10)
    assert (tmp_path / "bin/a").read_bytes() == ENTRIES[0].data


def test_same_bytes_in_any_order_and_nothing_of_the_host():
    assert cpio.archive(ENTRIES) == cpio.archive(list(reversed(ENTRIES)))
    raw = gzip.decompress(cpio.archive(ENTRIES))
    assert raw.startswith(b"070701")
    assert len(raw) % 4 == 0
