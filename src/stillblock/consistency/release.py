"""Letting everybody go after an instant, of one volume or of several.

First everybody is asked whether they hold still to that moment, which nobody has to write for.
Filesystems thaw next, all of them: an `after` hook may write to any. Then applications go on. It
begins as soon as the instant has passed, in a thread, or in the end; each is let go whatever
happens to the others.

A thaw writes to its disk, and a group holds the disks' roles until it is decided: whoever decides
must not wait for a thaw, only for the answers.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

JUDGE_S: Final = 5.0
"""All have this long to say whether they held still; meanwhile nothing is decided, and first
changes of all volumes wait. Who is stopped does not answer at all."""


class Held(Protocol):
    """What holds still for one volume's instant."""

    def judge(self) -> None:
        """Ask all that hold still to thaw, applications whether they hold; waits for no thaw."""

    def thaw(self) -> None:
        """Wait until its filesystems are thawed."""

    def let_applications_go(self) -> None:
        """Have its applications go on."""

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
        self._judge_until_s = 0.0
        self.problem = ""
        """Why it is not known whether all held still; empty if it is. Once that is judged."""
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
        self._judge_until_s = time.monotonic() + JUDGE_S
        self._thread = threading.Thread(target=self._run, name="release", daemon=True)
        self._thread.start()

    def wait_judged(self) -> bool:
        """Wait until it is known whether all held still until the instant; false: not in time.

        The time is one for all who ask.
        """
        return self._judged.wait(max(0.0, self._judge_until_s - time.monotonic()))

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
            self._all(lambda one: one.judge)
            self.problem = "; ".join(str(problem) for problem in self._problems)
            self._judged.set()
            # One that takes long to thaw must not keep others frozen.
            self._all(lambda one: one.thaw)
            for one in self._held:
                self._try(one.let_applications_go)
            for one in self._held:
                self._try(one.end_applications)

    def _all(self, work: Callable[[Held], Callable[[], None]]) -> None:
        """Do it for all at once."""
        first, others = self._held[:1], self._held[1:]
        threads = [
            threading.Thread(target=self._try, args=(work(one),), daemon=True) for one in others
        ]
        for thread in threads:
            thread.start()
        for one in first:
            self._try(work(one))
        for thread in threads:
            thread.join()

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised in `finish`, others being let go
            self._problems.append(error)
