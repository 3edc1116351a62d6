"""Arithmetic on byte extents: pure, half-open, linear in the number of extents.

An `Extents` value is *normal*: sorted, disjoint, not touching, no empty members. `normalise`
makes one from anything; every other function takes normal values and returns normal values.
Rounding to blocks happens here and nowhere else in Python.
"""

from bisect import bisect_right
from collections.abc import Iterable

from stillblock.model import Extent, Extents


def normalise(extents: Iterable[Extent]) -> Extents:
    """Sort, drop empty extents, merge those that overlap or touch."""
    return _merge_sorted(sorted(extents))


def union(a: Extents, b: Extents) -> Extents:
    """Return the bytes in either."""
    # Two sorted runs: the sort finds and merges them in linear time.
    return _merge_sorted(sorted(a + b))


def intersect(a: Extents, b: Extents) -> Extents:
    """Return the bytes in both."""
    result: list[Extent] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start = max(a[i][0], b[j][0])
        end = min(a[i][1], b[j][1])
        if start < end:
            result.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return tuple(result)


def subtract(a: Extents, b: Extents) -> Extents:
    """Return the bytes of `a` that are not in `b`."""
    result: list[Extent] = []
    j = 0
    for start, end in a:
        position = start
        while j < len(b) and b[j][1] <= position:
            j += 1
        # `j` stays on the last extent looked at: it may reach into the next one of `a`.
        while j < len(b) and b[j][0] < end:
            if position < b[j][0]:
                result.append((position, b[j][0]))
            position = b[j][1]
            if position >= end:
                break
            j += 1
        if position < end:
            result.append((position, end))
    return tuple(result)


def complement(a: Extents, *, size: int) -> Extents:
    """Return the bytes of `[0, size)` that are not in `a`."""
    return subtract(whole(size), a)


def clip(a: Extents, *, start: int, end: int) -> Extents:
    """Return the bytes of `a` inside `[start, end)`."""
    return intersect(a, normalise([(start, end)]))


def round_out(a: Extents, *, block_size: int, size: int) -> Extents:
    """Widen to whole blocks and clip to `size`: a block with one byte in `a` is in whole."""
    assert block_size > 0, "the volume checked its block size"
    return _merge_sorted(
        (
            start - start % block_size,
            min(end + -end % block_size, size),
        )
        for start, end in a
    )


def whole(size: int) -> Extents:
    """Return `[0, size)`."""
    return ((0, size),) if size > 0 else ()


def total_bytes(a: Extents) -> int:
    """Return how many bytes there are in `a`."""
    return sum(end - start for start, end in a)


class Ranges:
    """Normal extents, to be looked up by place: what lies in one of many costs no look at all."""

    def __init__(self, extents: Extents) -> None:
        self._extents = extents
        self._starts = [start for start, _ in extents]

    def within(self, extent: Extent) -> Extents:
        """Return what lies in an extent, cut to it."""
        start, end = extent
        found: list[Extent] = []
        index = max(0, bisect_right(self._starts, start) - 1)
        while index < len(self._extents) and self._extents[index][0] < end:
            begin, stop = self._extents[index]
            if max(begin, start) < min(stop, end):
                found.append((max(begin, start), min(stop, end)))
            index += 1
        return tuple(found)


def _merge_sorted(extents: Iterable[Extent]) -> Extents:
    result: list[Extent] = []
    last_start = last_end = -1
    for start, end in extents:
        if start >= end:
            continue
        if last_start >= 0 and start <= last_end:
            last_end = max(last_end, end)
            continue
        if last_start >= 0:
            result.append((last_start, last_end))
        last_start, last_end = start, end
    if last_start >= 0:
        result.append((last_start, last_end))
    return tuple(result)
