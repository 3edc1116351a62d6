"""Extents in few bytes come back as they were; anything else is refused."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillblock.extents import normalise
from stillblock.packing import PackingError, pack, unpack

EXTENTS = st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**62))).map(
    lambda pairs: normalise((min(pair), max(pair)) for pair in pairs)
)


@given(EXTENTS)
def test_extents_come_back_as_they_were(extents):
    assert unpack(pack(extents)) == extents


def test_a_fragmented_disk_takes_some_bytes_an_extent():
    dice = random.Random(4)
    at, extents = 0, []
    for _ in range(50_000):
        start = at + 4096 * dice.randint(1, 400)
        at = start + 4096 * dice.randint(1, 400)
        extents.append((start, at))
    began = time.process_time()
    text = pack(tuple(extents))
    assert unpack(text) == tuple(extents)
    assert len(text) < 5 * len(extents)
    assert time.process_time() - began < 2


CUT_SHORT = pack(((0, 5), (9, 20)))[:-8]


@pytest.mark.parametrize("text", ["", "x", "AAAA", CUT_SHORT, "eJxjYAAAAAIAAQ=="])
def test_what_was_not_packed_is_refused(text):
    with pytest.raises(PackingError):
        unpack(text)
