"""The instants of one open volume: prepared one at a time, and given up when the volume closes.

To bring applications and filesystems to hold still, or to wait for a quiet moment, takes up to
minutes. Nobody else waits for that: the volume's own lock is taken only once it is over.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stillblock.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Instants:
    """Who prepares an instant of a volume. Thread-safe.

    A turn is taken before the volume's lock, never under it.
    """

    def __init__(self, volume: str) -> None:
        self.is_closing = threading.Event()
        """Set once nothing may be waited for any more."""
        self.coming = ""
        """The name of the snapshot that is being prepared; empty: none is, or it has none yet."""
        self._volume = volume
        self._turn = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until nobody else prepares one; raise `ClosedError` once the volume closes."""
        with self._turn:
            if self.is_closing.is_set():
                raise ClosedError(f"{self._volume} is being closed; nothing was taken")
            try:
                yield
            finally:
                self.coming = ""

    def give_up(self) -> None:
        """Let whoever waits for a quiet moment wait no longer, and nobody begin. Does not block."""
        self.is_closing.set()

    def stop(self) -> None:
        """Give up, and wait until whoever was made to hold still was let go. Not under the lock."""
        self.give_up()
        with self._turn:
            pass
