"""Allocation bitmaps, one bit a cluster, lowest bit first: NTFS and exFAT have the same kind."""

import re
from collections.abc import Iterable
from functools import cache
from typing import Final

from stillblock.selection.filesystems.filesystem import UnresolvedError

CLAIMED_MAX: Final = 1 << 31
"""Clusters; what is claimed takes a bit each, 256 MiB then. 8 TiB of the 4 KiB clusters usual in
NTFS, 64 TiB of the 32 KiB ones usual in exFAT."""
FREE_RUNS_MAX: Final = 1_000_000
"""Some 120 MiB in memory: free space in more pieces than that is not told."""
_SPANS: Final = re.compile(rb"\x00+|\xff+|[^\x00\xff]+", re.DOTALL)


@cache
def _bit_spans(value: int) -> tuple[tuple[int, int], ...]:
    """Return where clear bits of one byte begin and end."""
    spans: list[tuple[int, int]] = []
    begin = -1
    for bit in range(9):
        is_clear = bit < 8 and not value >> bit & 1
        if is_clear and begin < 0:
            begin = bit
        elif not is_clear and begin >= 0:
            spans.append((begin, bit))
            begin = -1
    return tuple(spans)


def clear_runs(pieces: Iterable[bytes], *, count: int) -> list[tuple[int, int]]:
    """Return the half-open runs of clear bits among the first `count` of a bitmap.

    Raise `UnresolvedError` if they are more than `FREE_RUNS_MAX`, or the bitmap is too short.
    """
    runs: list[tuple[int, int]] = []
    last_begin = last_end = -1
    base = 0
    for piece in pieces:
        for span in _SPANS.finditer(piece):
            first = span.start()
            if piece[first] == 0:
                found: Iterable[tuple[int, int]] = ((first * 8, span.end() * 8),)
            elif piece[first] == 0xFF:
                continue
            else:
                found = (
                    (at * 8 + begin, at * 8 + end)
                    for at in range(first, span.end())
                    for begin, end in _bit_spans(piece[at])
                )
            for begin, end in found:
                if begin + base == last_end:
                    last_end = end + base
                    continue
                if last_begin >= 0:
                    runs.append((last_begin, last_end))
                last_begin, last_end = begin + base, end + base
        if len(runs) > FREE_RUNS_MAX:
            raise UnresolvedError(
                f"its free space is in more than {FREE_RUNS_MAX} pieces, too many to tell"
            )
        base += len(piece) * 8
        if base >= count:
            break
    if base < count:
        raise UnresolvedError(f"its bitmap has {base} bits for {count} clusters: it is damaged")
    if last_begin >= 0:
        runs.append((last_begin, last_end))
    while runs and runs[-1][1] > count:
        begin, _ = runs.pop()
        if begin < count:
            runs.append((begin, count))
    return runs


class Claims:
    """Which clusters somebody says are his: each may be claimed once."""

    def __init__(self, count: int, *, what: str) -> None:
        """Take how many clusters there are; raise `UnresolvedError` if `what` has too many."""
        if count > CLAIMED_MAX:
            raise UnresolvedError(f"{what} has {count} clusters, more than {CLAIMED_MAX} supported")
        self._count = count
        self._bits = bytearray((count + 7) // 8)

    def claim(self, first: int, count: int, who: object) -> None:
        """Mark `count` clusters from `first`; raise `UnresolvedError` if any is marked already.

        `who` is for the error: a name, a number.
        """
        if first < 0 or count <= 0 or first + count > self._count:
            raise UnresolvedError(f"data of {who} lies outside the filesystem: it is damaged")
        bits = self._bits
        begin, end = first, first + count
        low, high = begin >> 3, (end - 1) >> 3
        low_mask = 0xFF << (begin & 7) & 0xFF
        high_mask = 0xFF >> (7 - ((end - 1) & 7))
        if low == high:
            low_mask &= high_mask
            taken = bits[low] & low_mask
            bits[low] |= low_mask
        else:
            taken = bits[low] & low_mask or bits[high] & high_mask
            bits[low] |= low_mask
            bits[high] |= high_mask
            between = high - low - 1
            if between:
                taken = taken or bits.count(0, low + 1, high) != between
                bits[low + 1 : high] = b"\xff" * between
        if taken:
            raise UnresolvedError(f"data of {who} lies where another file lies: it is damaged")

    def check_allocated(self, pieces: Iterable[bytes]) -> None:
        """Raise `UnresolvedError` if a claimed cluster is free in the bitmap of these pieces."""
        at = 0
        for piece in pieces:
            claimed = int.from_bytes(self._bits[at : at + len(piece)], "little")
            if claimed & ~int.from_bytes(piece[: len(self._bits) - at], "little"):
                raise UnresolvedError(
                    "its bitmap gives space as free that a file has: it is in use or damaged"
                )
            at += len(piece)
            if at >= len(self._bits):
                return
        raise UnresolvedError("its bitmap is shorter than the filesystem: it is damaged")
