"""Comparing disk images: what differs between two, and whether a source is what it should be."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

Extent = tuple[int, int]
Expectation = Callable[[int, int], bytes]
"""Gives the bytes that should stand from `start` to `end`."""

BLOCK_BYTES: Final = 4096
CHUNK_BYTES: Final = 1 << 20


def chunks(start: int, end: int) -> Iterator[Extent]:
    """Cut a range into pieces of at most a MiB."""
    for position in range(start, end, CHUNK_BYTES):
        yield position, min(position + CHUNK_BYTES, end)


def read_range(file: BinaryIO, start: int, end: int) -> bytes:
    """Return what the file holds there; short only at its end."""
    file.seek(start)
    return file.read(end - start)


def differing_blocks(before: Path, after: Path, *, start: int, end: int) -> Iterator[Extent]:
    """Yield the extents of whole blocks within [start, end) in which two images differ."""
    open_start: int | None = None
    with before.open("rb") as old_file, after.open("rb") as new_file:
        for chunk_start, chunk_end in chunks(start, end):
            old = read_range(old_file, chunk_start, chunk_end)
            new = read_range(new_file, chunk_start, chunk_end)
            if old == new and open_start is None:
                continue
            for block in range(0, len(new), BLOCK_BYTES):
                differs = old[block : block + BLOCK_BYTES] != new[block : block + BLOCK_BYTES]
                if differs and open_start is None:
                    open_start = chunk_start + block
                elif not differs and open_start is not None:
                    yield open_start, chunk_start + block
                    open_start = None
    if open_start is not None:
        yield open_start, end


def first_difference(
    read: Expectation, expected: Expectation, *, start: int, end: int
) -> int | None:
    """Return the offset of the first byte that is not as expected, or None if all are."""
    for chunk_start, chunk_end in chunks(start, end):
        found, wanted = read(chunk_start, chunk_end), expected(chunk_start, chunk_end)
        if found != wanted:
            same = next(
                (
                    i
                    for i, pair in enumerate(zip(found, wanted, strict=False))
                    if len(set(pair)) > 1
                ),
                min(len(found), len(wanted)),
            )
            return chunk_start + same
    return None


def zeroed(read: Expectation, *, start: int, end: int) -> Expectation:
    """Return what `read` gives, with zeros in [start, end)."""

    def expected(chunk_start: int, chunk_end: int) -> bytes:
        low, high = max(chunk_start, start), min(chunk_end, end)
        if low >= high:
            return read(chunk_start, chunk_end)
        data = bytearray(read(chunk_start, chunk_end))
        data[low - chunk_start : high - chunk_start] = bytes(high - low)
        return bytes(data)

    return expected


def block_count(extents: Iterable[Extent]) -> int:
    """Return how many blocks aligned extents cover."""
    return sum(end - start for start, end in extents) // BLOCK_BYTES
