"""What a snapshot or clone holds, and for everything else the reason why it does not."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from stillblock import native
from stillblock.errors import ExcludedError, OriginIOError, SnapshotLostError, StillblockError
from stillblock.extents import Ranges, intersect, normalise, subtract, total_bytes
from stillblock.model import BLOCK_SIZE_MIN, Extent, Extents, Receipt, format_size
from stillblock.selection.decision import NOT_INCLUDED

_WINDOW_BYTES: Final = 256 << 20
"""What is in a clone is asked for so much of it at a time."""
_WINDOWS_MAX: Final = 64
_ZERO_TERM: Final = "zero"
"""What this term leaves out was seen to be zeros at the instant: its content is known."""


class Readable(Protocol):
    """A snapshot or a clone that is open: a view here, or an NBD connection to one elsewhere."""

    @property
    def size_bytes(self) -> int:
        """The disk's size at the instant."""

    def pread(self, *, offset: int, length: int) -> bytes:
        """Return exactly these bytes."""

    def extents(self, *, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Return (start, end, flags) of a range, flags as of `native.View.extents`."""

    def close(self) -> None:
        """Let it go."""


class Why(StrEnum):
    """Why something of a snapshot cannot be had."""

    EXCLUDED = "excluded"
    """Rules left it out."""
    LOST = "lost"
    """Selected, and could not be kept."""
    UNREADABLE = "unreadable"
    """The disk, the store or the server failed at it."""
    UNRESOLVED = "unresolved"
    """The filesystem, or how it keeps this file, is not understood."""
    UNSUPPORTED = "unsupported"
    """It is neither file, directory nor link, or cannot be made where it should go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why bytes are not given."""

    why: Why
    reason: str

    def error(self, what: str) -> StillblockError:
        """Return the error that says it."""
        kinds = {Why.EXCLUDED: ExcludedError, Why.LOST: SnapshotLostError}
        return kinds.get(self.why, OriginIOError)(f"{what}: {self.reason}")


class Held:
    """A snapshot or clone as what reads it sees it: its bytes or the reason, never other bytes.

    It is a `selection.disk.Disk`, on which reading what is not held is `OriginIOError`.
    """

    def __init__(self, readable: Readable, receipt: Receipt, *, clone: str | None = None) -> None:
        """Take what is open, the snapshot's receipt, and the reference of a clone of it."""
        self._readable = readable
        self._receipt = receipt
        self._is_clone = clone is not None
        self.reference: Final = clone or receipt.snapshot.reference
        self._selected = Ranges(receipt.extents)
        self._left_out = tuple(sorted(receipt.left_out, key=lambda part: part.start))
        self._left_out_starts = [part.start for part in self._left_out]
        self._windows: dict[int, Ranges] = {}

    @property
    def size(self) -> int:
        """The disk's size at the instant, in bytes."""
        return self._readable.size_bytes

    @property
    def receipt(self) -> Receipt:
        """The record of the snapshot."""
        return self._receipt

    @property
    def is_clone(self) -> bool:
        """Whether it is a clone, which may change while it is read."""
        return self._is_clone

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read; short at the end. Raise `OriginIOError` for what is not held."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        missing = self._not_selected((offset, offset + length))
        if not missing:
            return self._readable.pread(offset=offset, length=length)
        refusal = self._excluded(missing)
        if refusal is not None:
            raise OriginIOError(f"bytes {offset}+{length} are not held: {refusal.reason}")
        return self._read((offset, offset + length), missing)

    def _read(self, extent: Extent, missing: Extents) -> bytes:
        """Return bytes of the disk, with zeros in the place of what is missing."""
        parts: list[bytes] = []
        offset, end = extent
        for start, stop in (*missing, (end, end)):
            if offset < start:
                parts.append(self._readable.pread(offset=offset, length=start - offset))
            parts.append(bytes(stop - start))
            offset = stop
        return b"".join(parts)

    def peek(self, *, offset: int, length: int) -> bytes:
        """Read as `pread`, with zeros in the place of what is not selected: to look for signatures.

        What rules left out of a filesystem is free or some file's data, and no structure of it.
        """
        length = min(length, self.size - offset)
        extent = (offset, offset + length)
        return self._read(extent, self._not_selected(extent))

    def extents(self, *, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Return (start, end, flags) of a range, flags as of `native.View.extents`."""
        return self._readable.extents(offset=offset, length=length)

    def refusal(self, extents: Extents) -> Refusal | None:
        """Return why not all of these bytes of the disk can be given, or None if they can."""
        missing = tuple(part for extent in extents for part in self._not_selected(extent))
        if missing and (found := self._excluded(missing)) is not None:
            return found
        lost = self.lost(extents)
        if lost:
            return Refusal(why=Why.LOST, reason=f"{format_size(total_bytes(lost))} of it are lost")
        return None

    def lost(self, extents: Extents) -> Extents:
        """Return which of these bytes could not be kept."""
        if not self._receipt.lost:
            return ()
        lost = intersect(extents, self._receipt.lost)
        if not self._is_clone:
            return lost
        # What was written to a clone since is there again, block by block; only reading tells.
        return normalise(
            (at, min(end, at + BLOCK_SIZE_MIN))
            for start, end in lost
            for at in range(start, end, BLOCK_SIZE_MIN)
            if not self._can_read((at, min(end, at + BLOCK_SIZE_MIN)))
        )

    def _can_read(self, extent: Extent) -> bool:
        try:
            self._readable.pread(offset=extent[0], length=extent[1] - extent[0])
        except (SnapshotLostError, OriginIOError):
            return False
        return True

    def _excluded(self, missing: Extents) -> Refusal | None:
        """Return the refusal of what is not selected; None if all of it is known to be zeros."""
        by_reason: dict[str, int] = {}
        for start, end in missing:
            index = max(0, bisect_right(self._left_out_starts, start) - 1)
            position = start
            for part in self._left_out[index:]:
                if part.start >= end:
                    break
                begin, stop = max(part.start, position), min(part.end, end)
                if begin < stop:
                    if position < begin:
                        by_reason[NOT_INCLUDED] = by_reason.get(NOT_INCLUDED, 0) + begin - position
                    by_reason[part.because] = by_reason.get(part.because, 0) + stop - begin
                    position = stop
            if position < end:
                by_reason[NOT_INCLUDED] = by_reason.get(NOT_INCLUDED, 0) + end - position
        by_reason.pop(_ZERO_TERM, None)
        if not by_reason:
            return None
        because = max(by_reason, key=lambda reason: by_reason[reason])
        words = because if because == NOT_INCLUDED else f"left out by {because}"
        return Refusal(why=Why.EXCLUDED, reason=words)

    def _not_selected(self, extent: Extent) -> Extents:
        if not self._is_clone:
            return subtract((extent,), self._selected.within(extent))
        found: list[Extent] = []
        start, end = extent
        for base in range(start - start % _WINDOW_BYTES, end, _WINDOW_BYTES):
            found += self._window(base).within((max(start, base), min(end, base + _WINDOW_BYTES)))
        return tuple(found)

    def _window(self, base: int) -> Ranges:
        """Return what a clone does not hold of a window of it."""
        window = self._windows.get(base)
        if window is None:
            length = min(_WINDOW_BYTES, self.size - base)
            told = self._readable.extents(offset=base, length=length)
            missing = (part[:2] for part in told if part[2] & native.NOT_SELECTED)
            window = self._windows[base] = Ranges(tuple(missing))
            if len(self._windows) > _WINDOWS_MAX:
                del self._windows[next(iter(self._windows))]
        return window
