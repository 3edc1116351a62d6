"""Small volumes in memory for the model tests: made, opened, used at once, abandoned, measured."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from stillblock import native

PAUSE_LIMIT_MS: Final = 10_000
_SHM: Final = Path("/dev/shm")
MEMORY: Final = _SHM if os.access(_SHM, os.W_OK) else None
"""Where the model runs if it can: it is about content, not about devices."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory, in memory where there is one."""

    folder = Path(tempfile.mkdtemp(prefix="stillblock-model-", dir=MEMORY))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_volume(
    folder: Path, content: bytes, *, block_size: int = 4096, **options: object
) -> native.Volume:
    """Make an origin with this content, and open the volume of it."""
    (folder / "disk.img").write_bytes(content)
    native.create_volume(
        store=folder / "store", origin=folder / "disk.img", block_size=block_size, meta=b""
    )
    return open_volume(folder, **options)


def open_volume(folder: Path, **options: object) -> native.Volume:
    """Open it, with the write buffer in the same directory."""
    store = folder / "store"
    return native.Volume.open(store, buffer_dir=folder, **options)  # type: ignore[arg-type]


def take(volume: native.Volume, *extents: tuple[int, int], meta: bytes = b"") -> int:
    """Take a snapshot of byte ranges, of everything without any; return its epoch."""
    selection = extents or ((0, volume.size_bytes),)
    return volume.snapshot(selection=selection, meta=meta, pause_limit_ms=PAUSE_LIMIT_MS).epoch


def read_snapshot(volume: native.Volume, epoch: int) -> bytes:
    """Return all of a snapshot, zeros for what it does not select."""
    view = volume.view(epoch=epoch)
    try:
        return view.pread(offset=0, length=view.size_bytes)
    finally:
        view.close()


def log_allocated_bytes(folder: Path) -> int:
    """Return what `du` says the log takes."""
    return sum(path.stat().st_blocks * 512 for path in (folder / "store" / "log").iterdir())


def at_once(*calls: Callable[[], object]) -> None:
    """Run them in threads of their own, begun together; raise what any of them raised."""
    start, errors = threading.Barrier(len(calls), timeout=30), []

    def run(call: Callable[[], object]) -> None:
        start.wait()
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
