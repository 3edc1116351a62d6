"""Letting everybody go after an instant, of one volume or of several.

Filesystems thaw first, all of them: an `after` hook may write to any. Then applications go on. It
begins as soon as the instant has passed, in a thread, or in the end; each is let go whatever
happens to the others.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

JUDGE_S: Final = 20.0
"""A thaw that was asked for has 15 s to say so; meanwhile nothing is decided, and first changes of
all volumes wait."""


class Held(Protocol):
    """What holds still for one volume's instant."""

    def thaw(self) -> None:
        """Thaw its filesystems, and judge whether they were frozen until the instant."""

    def let_applications_go(self) -> None:
        """Have its applications go on, and judge whether they held still until the instant."""

    def end_applications(self) -> None:
        """Wait until they do."""


class Release:
    """Whoever holds still for one instant is let go, once. Thread-safe."""

    def __init__(self) -> None:
        self._held: Sequence[Held] = ()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_over = False
        self._judged = threading.Event()
        self._problems: list[BaseException] = []

    def of(self, held: Sequence[Held]) -> None:
        """Say who is to be let go."""
        self._held = tuple(held)

    @property
    def has_begun(self) -> bool:
        """Whether all are being let go in a thread."""
        return self._thread is not None

    def begin(self) -> None:
        """Let all go, in a thread."""
        self._thread = threading.Thread(target=self._run, name="release", daemon=True)
        self._thread.start()

    def wait_judged(self) -> bool:
        """Wait until it is known whether all held still until the instant; false: not in time."""
        return self._judged.wait(JUDGE_S)

    def finish(self) -> None:
        """Return once everybody was let go; raise what went wrong with it, the first time."""
        if self._thread is not None:
            self._thread.join()
        self._run()
        problems, self._problems = self._problems, []
        if problems:
            raise problems[0]

    def _run(self) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            # One that takes long to thaw must not keep others frozen.
            thaws = [
                threading.Thread(target=self._try, args=(one.thaw,), daemon=True)
                for one in self._held[1:]
            ]
            for thaw in thaws:
                thaw.start()
            for one in self._held[:1]:
                self._try(one.thaw)
            for thaw in thaws:
                thaw.join()
            for one in self._held:
                self._try(one.let_applications_go)
            self._judged.set()
            for one in self._held:
                self._try(one.end_applications)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised in `finish`, others being let go
            self._problems.append(error)
