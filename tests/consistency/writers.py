"""Somebody who writes without a break, so that it is never quiet."""

from __future__ import annotations

import threading
from typing import Self

import stillblock


class Writer:
    """Writes one block again and again, without a break."""

    def __init__(self, volume: stillblock.Volume, offset: int) -> None:
        self._stop = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(volume, offset))

    def _run(self, volume: stillblock.Volume, offset: int) -> None:
        while not self._stop.is_set():
            volume.pwrite(b"w" * 4096, offset=offset)
            self._first.set()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._first.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
