"""Digests as they are published, alone and in lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmtasks.errors import FetchError
from vmtasks.installer.download.want import Digest, parse_sums


@given(
    st.dictionaries(
        st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9 ()=._-]{0,30}", fullmatch=True), st.binary(min_size=16, max_size=16)
    )
)
def test_sums_in_both_forms(sums: dict[str, bytes]):
    """As md5 of BSD writes them, and as md5sum of GNU does, also for files read as binary and below `.`."""
    heading = ["# a heading", "d41d8cd98f00b204e9800998ecf8427 short", ""]
    for mark in (" ", "*", " ./"):
        lines = [f"{digest.hex()} {mark}{name}" for name, digest in sums.items() if not name.endswith(" ")]
        known = {name: digest.hex() for name, digest in sums.items() if not name.endswith(" ")}
        assert parse_sums("\n".join([*heading, *lines])) == known
    lines = [f"MD5 ({name}) = {digest.hex()}" for name, digest in sums.items()]
    text = "\r\n".join(["a heading", *lines, "SHA256 (x) = 00", "MD5 (short) = 00", ""])
    assert parse_sums(text) == {name: digest.hex() for name, digest in sums.items()}


def test_bsd_sums_that_contradict_each_other():
    with pytest.raises(FetchError, match="two different digests for a"):
        parse_sums(f"MD5 (a) = {'0' * 32}\nMD5 (a) = {'1' * 32}\n")


@pytest.mark.parametrize(
    ("algorithm", "digits"), [("md5", "0" * 31), ("sha256", "g" * 64), ("crc32", "0" * 8), ("md5", "")]
)
def test_digests_that_cannot_be(algorithm: str, digits: str):
    with pytest.raises(ValueError, match="not the hexadecimal form"):
        Digest(algorithm, digits)
    assert Digest("md5", "A" * 32) == Digest("md5", "a" * 32)
