"""Disks as selection reads them: a raw file or device, a live volume, a snapshot over one."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stillblock import native
from stillblock.errors import ClosedError, ExcludedError, OriginIOError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class RawDisk:
    """A raw file or device that nobody serves."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self._size = os.lseek(descriptor, 0, os.SEEK_END)

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self._size

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read; short at the end."""
        parts: list[bytes] = []
        while length > 0:
            try:
                part = os.pread(self._descriptor, length, offset)
            except OSError as error:
                raise OriginIOError(
                    f"{self._path}: reading {length} bytes at {offset}: {error.strerror}"
                ) from error
            if not part:
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)


@contextmanager
def open_raw(path: Path) -> Iterator[RawDisk]:
    """Open a raw file or device for reading."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise OriginIOError(f"cannot open {path}: {error.strerror}") from error
    try:
        yield RawDisk(descriptor, path)
    finally:
        os.close(descriptor)


class LiveDisk:
    """The live disk of an open volume."""

    def __init__(self, volume: native.Volume) -> None:
        self._volume = volume

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self._volume.size_bytes

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read; short at the end."""
        length = min(length, self.size - offset)
        return self._volume.pread(offset=offset, length=length) if length > 0 else b""


class FrozenDisk:
    """A snapshot as its rules are resolved on it: bytes of the instant or an error, nothing else.

    Reads of what the snapshot does not select fail. Zeros would be taken for an empty structure,
    and what an empty structure describes would be left out.
    """

    def __init__(self, view: native.View, *, is_cancelled: Callable[[], bool]) -> None:
        self._view = view
        self._is_cancelled = is_cancelled

    @property
    def size(self) -> int:
        """The size at the instant."""
        return self._view.size_bytes

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read; raise `OriginIOError` for what is not held, `ClosedError` once nobody waits."""
        if self._is_cancelled():
            raise ClosedError("nobody waits for the rules to be resolved any more")
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        try:
            return self._view.pread(offset=offset, length=length)
        except ExcludedError as error:
            raise OriginIOError(
                f"bytes {offset}+{length} are left out by range or partition, so what they say "
                "is not known"
            ) from error


class SnapshotDisk:
    """A snapshot or a clone, with the live disk where the snapshot selects nothing.

    The terms of a partial restore name partitions of the snapshot; when its rules left the table
    out, the present one is the best there is.
    """

    def __init__(self, view: native.View | native.Clone, live: native.Volume) -> None:
        self._view = view
        self._live = LiveDisk(live)

    @property
    def size(self) -> int:
        """The size at the instant."""
        return self._view.size_bytes

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read; short at the end."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        data = bytearray(self._view.pread(offset=offset, length=length))
        for start, end, flags in self._view.extents(offset=offset, length=length):
            if flags & native.NOT_SELECTED:
                begin, stop = max(start, offset), min(end, offset + length)
                found = self._live.pread(offset=begin, length=stop - begin)
                data[begin - offset : begin - offset + len(found)] = found
        return bytes(data)
