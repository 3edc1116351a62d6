"""Extent arithmetic, against sets of integers."""

import itertools
import time
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from stillblock import extents as ex
from stillblock.model import Extents

SPACE = 200

raw_extents = st.lists(st.tuples(st.integers(0, SPACE), st.integers(0, SPACE)), max_size=12)
normal_extents = raw_extents.map(ex.normalise)


def as_set(extents: Iterable[tuple[int, int]]) -> set[int]:
    return {byte for start, end in extents for byte in range(start, end)}


def assert_normal(extents: Extents) -> None:
    assert all(start < end for start, end in extents)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(extents))


@given(raw_extents)
def test_normalising_keeps_the_bytes_and_gives_sorted_separate_extents(
    raw: list[tuple[int, int]],
) -> None:
    result = ex.normalise(raw)
    assert_normal(result)
    assert as_set(result) == as_set(raw)


@given(normal_extents, normal_extents)
def test_the_algebra_is_that_of_sets(a: Extents, b: Extents) -> None:
    for result, expected in (
        (ex.union(a, b), as_set(a) | as_set(b)),
        (ex.intersect(a, b), as_set(a) & as_set(b)),
        (ex.subtract(a, b), as_set(a) - as_set(b)),
        (ex.complement(a, size=SPACE), set(range(SPACE)) - as_set(a)),
    ):
        assert_normal(result)
        assert as_set(result) == expected
    assert ex.total_bytes(a) == len(as_set(a))


@given(normal_extents, st.integers(0, SPACE), st.integers(0, SPACE))
def test_clipping_keeps_what_lies_inside(a: Extents, start: int, end: int) -> None:
    assert as_set(ex.clip(a, start=start, end=end)) == as_set(a) & set(range(start, end))


@given(normal_extents, st.integers(1, 17), st.integers(0, 16))
def test_rounding_out_selects_a_block_with_one_byte_in_and_no_other(
    a: Extents, block_size: int, tail: int
) -> None:
    size = SPACE + tail
    result = ex.round_out(a, block_size=block_size, size=size)
    assert_normal(result)
    blocks = {byte // block_size for byte in as_set(a)}
    assert as_set(result) == {byte for byte in range(size) if byte // block_size in blocks}


def test_touching_extents_become_one() -> None:
    assert ex.normalise([(4, 8), (0, 4)]) == ((0, 8),)
    assert ex.round_out(((0, 1), (4097, 4098)), block_size=4096, size=8192) == ((0, 8192),)


def test_a_hundred_thousand_extents_take_well_under_a_second() -> None:
    a = tuple((i * 100, i * 100 + 50) for i in range(100_000))
    b = tuple((i * 100 + 25, i * 100 + 75) for i in range(100_000))
    began = time.process_time()
    ex.union(a, b)
    ex.intersect(a, b)
    ex.subtract(a, b)
    ex.complement(a, size=10_000_000)
    ex.round_out(a, block_size=4096, size=10_000_000)
    # Processor time, so that a busy machine does not matter; quadratic work would take minutes.
    assert time.process_time() - began < 2
