"""Digests as they are published, alone and in lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmtasks.errors import FetchError
from vmtasks.media.digest import Digest, parse_bsd_sums


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
