"""Copying a whole snapshot or clone out: what there is to copy, and raw images that can be resumed.

What is not selected becomes holes. What is lost is an error, unless that may become holes too.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, Protocol

from stillblock import native
from stillblock.errors import InUseError, RefusedError, SnapshotLostError, StillblockError
from stillblock.extents import clip, normalise, subtract, total_bytes, union, whole
from stillblock.model import Extent, Extents, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stillblock.operations.held import Held

CHUNK_BYTES: Final = 1 << 20
STEP_BYTES: Final = 64 << 20
"""A raw image is made durable, and its digest written down, each time so much of it is done."""
_GRAIN_BYTES: Final = 64 * 1024
"""Data that is zeros for as long as this becomes a hole."""
_WINDOW_BYTES: Final = 1 << 30
_ZEROS: Final = bytes(CHUNK_BYTES)
_PRIVATE: Final = 0o600
_STEPS_VERSION: Final = 1


class ExportError(StillblockError):
    """An image could not be written; what there is of it is not under its name."""

    code = "export"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """What an export copies."""

    reference: str
    size_bytes: int
    data: Extents
    """To copy; the rest of the image is holes."""
    left_out_bytes: int
    """Not selected, so holes."""
    lost: Extents
    """Selected, and not there; holes only because that was asked for."""

    @property
    def data_bytes(self) -> int:
        """How much there is to copy."""
        return total_bytes(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An export that ended."""

    reference: str
    target: str
    format: str
    size_bytes: int
    data_bytes: int
    """Copied, now or before it was resumed."""
    left_out_bytes: int
    lost_bytes: int
    verified_bytes: int = 0
    """Of an export that was resumed: what was there already and came to its digest."""


class Target(Protocol):
    """Where an export goes."""

    def write(self, data: memoryview, *, offset: int) -> None:
        """Put data; offsets only grow, and no piece lies in two steps."""


def plan_export(held: Held, *, allow_lost: bool = False) -> ExportPlan:
    """Return what an export copies; raise `SnapshotLostError` if not all is there."""
    data: list[Extent] = []
    left_out = 0
    for base in range(0, held.size, _WINDOW_BYTES):
        length = min(_WINDOW_BYTES, held.size - base)
        for start, end, flags in held.extents(offset=base, length=length):
            if flags & native.NOT_SELECTED:
                left_out += end - start
            elif not flags & native.ZERO:
                data.append((start, end))
    lost = held.lost(whole(held.size))
    if not held.is_clone:
        lost = union(lost, held.receipt.damaged)
    lost = subtract(lost, subtract(whole(held.size), normalise(data)))
    if lost and not allow_lost:
        raise SnapshotLostError(
            f"{held.reference} lost {format_size(total_bytes(lost))} in {len(lost)} extents; an "
            "image would not be whole",
            hint="--allow-lost exports it with holes in their place",
        )
    return ExportPlan(
        reference=held.reference,
        size_bytes=held.size,
        data=subtract(normalise(data), lost),
        left_out_bytes=left_out,
        lost=lost,
    )


def copy_data(
    held: Held,
    plan: ExportPlan,
    target: Target,
    *,
    start: int = 0,
    told: Callable[[int, int], None] | None = None,
) -> None:
    """Copy what the plan says from `start` on; `told` hears the bytes done and of how many."""
    total = plan.data_bytes
    done = total_bytes(clip(plan.data, start=0, end=start)) if start else 0
    for begin, end in clip(plan.data, start=start, end=plan.size_bytes):
        position = begin
        while position < end:
            # Not across the end of a step, so that each is whole when it is told.
            stop = min(end, position + CHUNK_BYTES, position - position % STEP_BYTES + STEP_BYTES)
            data = held.pread(offset=position, length=stop - position)
            for at, piece in _without_zeros(data):
                target.write(piece, offset=position + at)
            done += stop - position
            position = stop
            if told is not None:
                told(done, total)


def _without_zeros(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset, piece) of all but longer runs of zeros."""
    view = memoryview(data)
    begin = None
    for at in range(0, len(data), _GRAIN_BYTES):
        piece = view[at : at + _GRAIN_BYTES]
        is_zero = piece == _ZEROS[: len(piece)]
        if is_zero and begin is not None:
            yield begin, view[begin:at]
            begin = None
        elif not is_zero and begin is None:
            begin = at
    if begin is not None:
        yield begin, view[begin:]


def stream(held: Held, plan: ExportPlan, write: Callable[[bytes | memoryview], object]) -> None:
    """Write all of the disk in order, holes as zeros."""
    target = _Stream(write)
    copy_data(held, plan, target)
    target.fill(plan.size_bytes)


class _Stream:
    def __init__(self, write: Callable[[bytes | memoryview], object]) -> None:
        self._write = write
        self._position = 0

    def write(self, data: memoryview, *, offset: int) -> None:
        self.fill(offset)
        self._write(data)
        self._position += len(data)

    def fill(self, end: int) -> None:
        """Write zeros up to there."""
        while self._position < end:
            count = min(CHUNK_BYTES, end - self._position)
            self._write(_ZEROS[:count])
            self._position += count


# Raw images -------------------------------------------------------------------------------------


class RawImage:
    """A raw image under `NAME.partial` until it is whole, and beside it what is done of it.

    `NAME.partial.steps` says of which instant it is and, for each step of 64 MiB in which data was
    put, where it ends, where the data is and its digest, appended once that is durable.
    """

    def __init__(self, target: Path, plan: ExportPlan, *, instant: str | None) -> None:
        """Say where it goes, and what tells the instant it is of; None: it cannot be resumed."""
        self.target: Final = target
        self.partial: Final = target.with_name(f"{target.name}.partial")
        self._steps = target.with_name(f"{target.name}.partial.steps")
        self._plan = plan
        self._instant = instant
        self._image = -1
        self._log = -1
        self._is_own = False
        """Whether what lies there is of this export, made or taken over."""
        self._step_count = 0
        self._written: list[Extent] = []
        """Of the step that is under way."""
        self._digest = _new_digest()

    def open(self, *, resume: bool = False) -> int:
        """Make it, or go on with what is there; return the offset from which to copy.

        Raise `RefusedError` if something is there already, or what is there is of another instant.
        """
        if self.target.exists() or self.target.is_symlink():
            raise RefusedError(f"{self.target} exists already; it is not overwritten")
        try:
            start = self._resume() if resume else self._create()
            os.ftruncate(self._image, self._plan.size_bytes)
        except OSError as error:
            raise ExportError(f"{self.partial}: {error.strerror}") from error
        return start

    def write(self, data: memoryview, *, offset: int) -> None:
        """Put data; offsets only grow, and no piece lies in two steps."""
        try:
            if self._written and self._written[0][0] // STEP_BYTES != offset // STEP_BYTES:
                self._end_step()
            self._digest.update(data)
            self._written.append((offset, offset + len(data)))
            done = 0
            while done < len(data):
                done += os.pwrite(self._image, data[done:], offset + done)
        except OSError as error:
            raise ExportError(f"{self.partial}: {error.strerror}") from error

    def finish(self) -> None:
        """Give it its name, durably."""
        try:
            os.fsync(self._image)
            # Unlike a rename, a link takes nobody's place.
            os.link(self.partial, self.target)
            self._remove()
            self._is_own = False
            sync_folder(self.target)
        except OSError as error:
            raise ExportError(f"{self.target}: {error.strerror}") from error

    def close(self) -> bool:
        """Let go; return whether something is left that can be resumed."""
        for descriptor in (self._image, self._log):
            if descriptor >= 0:
                os.close(descriptor)
        self._image = self._log = -1
        if self._is_own and self._step_count == 0:
            with suppress(OSError):
                self._remove()
        return self._is_own and self.partial.exists()

    def _create(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._image = os.open(self.partial, flags, _PRIVATE)
        except FileExistsError as error:
            raise RefusedError(
                f"{self.partial} is left of an export that was broken off",
                hint="--resume goes on with it; or remove it",
            ) from error
        self._lock()
        self._is_own = True
        if self._instant is not None:
            self._log = os.open(self._steps, flags & ~os.O_EXCL | os.O_TRUNC, _PRIVATE)
            self._append({"version": _STEPS_VERSION} | self._identity())
        return 0

    def _resume(self) -> int:
        """Open what is there; return the end of the last step before which all is verified."""
        if self._instant is None:
            raise RefusedError(f"{self._plan.reference} may have changed: it cannot be resumed")
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._image = os.open(self.partial, flags)
            self._log = os.open(self._steps, flags)
        except FileNotFoundError as error:
            raise RefusedError(
                f"{self.partial} and its list of steps are not there: nothing can be resumed"
            ) from error
        self._lock()
        with os.fdopen(os.dup(self._log), "rb") as file:
            lines = file.read().splitlines(keepends=True)
        head = _parsed(lines[0]) if lines else None
        if head is None or {key: head.get(key) for key in self._identity()} != self._identity():
            told = head.get("reference") if head else None
            raise RefusedError(
                f"{self.partial} is not of {self._plan.reference} at this instant, but of "
                f"{told or 'something unknown'}",
                hint="remove it, or export under another name",
            )
        self._is_own = True
        kept, start = len(lines[0]), 0
        for line in lines[1:]:
            end = self._verified(line, after=start)
            if end is None:
                break
            start = end
            kept += len(line)
            self._step_count += 1
        os.ftruncate(self._log, kept)
        os.lseek(self._log, kept, os.SEEK_SET)
        # Whatever lies behind was not known to be durable: it is zeros until it is put again.
        os.ftruncate(self._image, start)
        return start

    def _verified(self, line: bytes, *, after: int) -> int | None:
        """Return where the step ends that a line tells of, None if not all of it is there."""
        document = _parsed(line)
        try:
            assert document is not None
            extents = [(int(start), int(end)) for start, end in document["extents"]]
            expected, step_end = str(document["digest"]), int(document["end"])
        except (AssertionError, KeyError, TypeError, ValueError):
            return None
        if step_end > self._plan.size_bytes:
            return None
        digest = _new_digest()
        for start, end in extents:
            if not after <= start < end <= step_end:
                return None
            for at in range(start, end, CHUNK_BYTES):
                data = os.pread(self._image, min(CHUNK_BYTES, end - at), at)
                if len(data) != min(CHUNK_BYTES, end - at):
                    return None
                digest.update(data)
        return step_end if digest.hexdigest() == expected else None

    def _end_step(self) -> None:
        """Make a step durable, and write down that it is."""
        os.fdatasync(self._image)
        if self._log >= 0:
            extents = normalise(self._written)
            end = extents[0][0] - extents[0][0] % STEP_BYTES + STEP_BYTES
            end = min(end, self._plan.size_bytes)
            digest = self._digest.hexdigest()
            self._append({"end": end, "extents": extents, "digest": digest})
            self._step_count += 1
        self._written = []
        self._digest = _new_digest()

    def _append(self, document: dict[str, Any]) -> None:
        line = json.dumps(document, separators=(",", ":")).encode() + b"\n"
        if os.write(self._log, line) != len(line):
            raise OSError(0, "the list of steps could not be written")
        os.fdatasync(self._log)

    def _identity(self) -> dict[str, Any]:
        return {
            "instant": self._instant,
            "size_bytes": self._plan.size_bytes,
            "reference": self._plan.reference,
        }

    def _lock(self) -> None:
        try:
            fcntl.flock(self._image, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._image)
            self._image = -1
            raise InUseError(f"{self.partial} is being written by another export") from error

    def _remove(self) -> None:
        self.partial.unlink(missing_ok=True)
        self._steps.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make the name of a file durable."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _new_digest() -> blake2b:
    return blake2b(digest_size=32)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(line)
    except ValueError:
        return None
    return document if isinstance(document, dict) and line.endswith(b"\n") else None
