"""Compressed data in blocks of any size, and in as many streams as there may be."""

import bz2
import gzip
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmtasks.installer.download import content

COMPRESSORS = {"bz2": bz2.compress, "gz": gzip.compress, "xz": lzma.compress}


@settings(max_examples=60, deadline=None)
@given(
    packing=st.sampled_from(sorted(COMPRESSORS)),
    streams=st.lists(st.binary(max_size=3000), min_size=1, max_size=4),
    step=st.integers(1, 400),
)
def test_streams_in_blocks_of_any_size(packing: str, streams: list[bytes], step: int):
    packed = b"".join(map(COMPRESSORS[packing], streams))
    unpacker = content.Unpacker(packing)
    plain = b"".join(part for at in range(0, len(packed), step) for part in unpacker.feed(packed[at : at + step]))
    unpacker.finish()
    assert plain == b"".join(streams)


@pytest.mark.parametrize("packing", sorted(COMPRESSORS))
def test_a_small_input_with_a_huge_content_comes_in_bounded_blocks(packing: str):
    plain = bytes(9_000_001)
    unpacker = content.Unpacker(packing)
    sizes = [len(block) for block in unpacker.feed(COMPRESSORS[packing](plain))]
    unpacker.finish()
    assert sum(sizes) == len(plain)
    assert max(sizes) <= content.BLOCK
