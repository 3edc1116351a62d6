"""Making a clone a disk of its own: a raw image with all that it holds, copied in a thread."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock import native
from stillblock.errors import (
    InUseError,
    NotFoundError,
    RefusedError,
    SnapshotLostError,
    StillblockError,
    StoreDamagedError,
    UsageError,
)
from stillblock.model import format_size
from stillblock.operations.clones import CloneTarget, clone_info, find_clone
from stillblock.operations.placing import put_in_place, sync_folder

if TYPE_CHECKING:
    from stillblock.operations.volume import OpenVolume

WAIT_MS_MAX: Final = 10_000
_CHUNK_BYTES: Final = 1 << 20
_WINDOW_BYTES: Final = 1 << 30
"""What is in a clone is asked for so much of it at a time."""
_PRIVATE: Final = 0o600


class ImageWriteError(StillblockError):
    """The new image could not be written; nothing is left of it."""

    code = "image_write"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteRequest:
    """A clone to copy to a new raw image, also while clients use it if forced: they are cut."""

    snapshot: str
    clone: str
    path: str
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitPromotionRequest:
    """How long to wait for it to end."""

    timeout_ms: int = WAIT_MS_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteProgress:
    """How far the latest promotion is."""

    volume: str
    clone: str = ""
    path: str = ""
    is_running: bool = False
    is_done: bool = False
    """The image is there, whole and durable."""
    done_bytes: int = 0
    total_bytes: int = 0
    left_out_bytes: int = 0
    """What neither the snapshot selects nor was written: zeros in the image."""
    failure: str = ""


class Promotion:
    """One promotion, in a thread of its own. The clone is not offered to clients meanwhile."""

    def __init__(self, volume: OpenVolume, clone: native.Clone, *, name: str, target: Path) -> None:
        self.number = clone.number
        self._volume = volume
        self._clone = clone
        self._name = name
        self._target = target
        self._partial = target.with_name(target.name + ".partial")
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._is_done = False
        self._failure = ""
        self._done_bytes = 0
        self._extents, self._left_out_bytes = _content(clone, name)
        self._total_bytes = sum(end - start for start, end in self._extents)
        self._thread = threading.Thread(target=self._run, name="promotion", daemon=True)

    def start(self) -> None:
        """Begin; raise if the image cannot be made."""
        if self._target.exists():
            raise RefusedError(f"{self._target} exists already; it is not overwritten")
        try:
            descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE)
        except OSError as error:
            raise ImageWriteError(f"{self._partial} cannot be made: {error.strerror}") from error
        os.close(descriptor)
        self._thread.start()

    def cancel(self) -> None:
        """Stop, and wait until it has; nothing is left of the image."""
        self._cancelled.set()
        if self._thread.is_alive():
            self._thread.join()

    def wait(self, timeout_s: float) -> None:
        """Wait until it ended or the time is over."""
        self._ended.wait(timeout_s)

    def progress(self) -> PromoteProgress:
        """Return how far it is."""
        return PromoteProgress(
            volume=self._volume.name,
            clone=self._name,
            path=str(self._target),
            is_running=not self._ended.is_set(),
            is_done=self._is_done,
            done_bytes=self._done_bytes,
            total_bytes=self._total_bytes,
            left_out_bytes=self._left_out_bytes,
            failure=self._failure,
        )

    def _run(self) -> None:
        try:
            self._copy()
            self._is_done = True
        except StillblockError as error:
            self._failure = str(error)
        except OSError as error:
            self._failure = f"{self._target}: {error.strerror}"
        finally:
            self._conclude()
            self._ended.set()

    def _copy(self) -> None:
        with self._partial.open("r+b", buffering=0) as image:
            image.truncate(self._clone.size_bytes)
            for start, end in self._extents:
                for offset in range(start, end, _CHUNK_BYTES):
                    if self._cancelled.is_set():
                        raise ImageWriteError(f"{self._target}: the copy was broken off")
                    length = min(_CHUNK_BYTES, end - offset)
                    content = memoryview(self._clone.pread(offset=offset, length=length))
                    while content:
                        written = os.pwrite(image.fileno(), content, offset + length - len(content))
                        content = content[written:]
                    self._done_bytes += length
            os.fsync(image.fileno())
        put_in_place(self._partial, self._target)
        sync_folder(self._target)

    def _conclude(self) -> None:
        try:
            self._partial.unlink(missing_ok=True)
            self._clone.close()
        except (OSError, StillblockError) as error:
            self._failure = self._failure or f"{self._target}: {error}"
        self._volume.event(
            "clone_promoted" if self._is_done else "clone_promotion_failed",
            clone=self._name,
            path=str(self._target),
            bytes=self._done_bytes,
            failure=self._failure,
        )
        # Offered again once nobody can take this for running.
        self._ended.set()
        self._volume.hooks.reconcile(self._volume)


def _content(clone: native.Clone, name: str) -> tuple[list[tuple[int, int]], int]:
    """Return the extents with data, and the bytes that are left out; raise if some are lost."""
    extents: list[tuple[int, int]] = []
    left_out = lost = 0
    for at in range(0, clone.size_bytes, _WINDOW_BYTES):
        length = min(_WINDOW_BYTES, clone.size_bytes - at)
        for start, end, flags in clone.extents(offset=at, length=length):
            lost += end - start if flags & native.LOST else 0
            left_out += end - start if flags & native.NOT_SELECTED else 0
            if not flags & native.HOLE:
                extents.append((start, end))
    if lost:
        raise SnapshotLostError(
            f"{name} lost {format_size(lost)} with its snapshot; an image would not be whole",
            hint="write what is missing to the clone first, or copy out what you need",
        )
    return extents, left_out


def start_promotion(volume: OpenVolume, request: PromoteRequest) -> PromoteProgress:
    """Start to copy a clone to a new image; raise `InUseError` if clients use it, unless forced."""
    target = Path(request.path)
    if not target.is_absolute():
        raise UsageError(f"{request.path!r} is not an absolute path")
    with volume.lock:
        running = volume.promotion
        if running is not None and running.progress().is_running:
            raise InUseError(f"{running.progress().clone} is being copied to an image already")
        clone = find_clone(volume, CloneTarget(snapshot=request.snapshot, clone=request.clone))
        info = clone_info(volume, clone)
        if clone.entry.damage:
            raise StoreDamagedError(f"{info.reference} cannot be opened: {clone.entry.damage}")
        number = clone.entry.number
        try:
            volume.hooks.withdraw_clone(volume, number, force=request.force)
            opened = volume.engine.open_clone(number=number)
            try:
                promotion = Promotion(volume, opened, name=info.reference, target=target)
                promotion.start()
            except BaseException:
                opened.close()
                raise
            volume.promotion = promotion
        finally:
            volume.hooks.reconcile(volume)
        return promotion.progress()


def promotion_status(volume: OpenVolume) -> PromoteProgress:
    """Return how far the latest promotion is."""
    running = volume.promotion
    return PromoteProgress(volume=volume.name) if running is None else running.progress()


def wait_promotion(volume: OpenVolume, request: WaitPromotionRequest) -> PromoteProgress:
    """Wait until it ended or the time is over; return how far it is then."""
    running = volume.promotion
    if running is not None:
        running.wait(max(0, min(request.timeout_ms, WAIT_MS_MAX)) / 1000)
    return promotion_status(volume)


def cancel_promotion(volume: OpenVolume) -> PromoteProgress:
    """Stop it; nothing is left of the image. Raise `NotFoundError` if none runs."""
    running = volume.promotion
    if running is None or not running.progress().is_running:
        raise NotFoundError(f"no clone of {volume.name} is being copied")
    running.cancel()
    return running.progress()
