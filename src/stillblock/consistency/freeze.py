"""Freeze mounted filesystems around an instant, each with a guard that thaws it if we cannot."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

from stillblock.consistency import guard
from stillblock.consistency.watchdog import REPLY_S, THAW_REPLY_S, Watchdog
from stillblock.errors import QuiesceError
from stillblock.model import QuiesceStep, StepKind

if TYPE_CHECKING:
    from stillblock.consistency.mounts import Mount


class MountFreeze:
    """One mounted filesystem, frozen from `begin` until `end`."""

    def __init__(self, mount: Mount, *, limit_ms: int) -> None:
        self._mount = mount
        self._limit_ms = limit_ms
        self._watchdog: Watchdog | None = None
        self._begun_ns = 0
        self.thawed_ns: int | None = None
        """When thawing began, on the monotonic clock; None while frozen."""
        self.shortfall = ""

    @property
    def what(self) -> str:
        """The mount point."""
        return str(self._mount.path)

    def begin(self) -> QuiesceStep:
        """Freeze; raise `QuiesceError`, with nothing left frozen for long, if that fails."""
        started_ns = time.monotonic_ns()
        self._watchdog = Watchdog(
            "guard.py",
            [str(self._mount.fd), str(self._limit_ms)],
            fds=(self._mount.fd,),
        )
        answer = self._watchdog.receive(self._limit_ms / 1000 + REPLY_S)
        if answer is not None and "frozen" in answer:
            self._begun_ns = int(answer["frozen"])
            now_ns = time.monotonic_ns()
            return QuiesceStep(
                kind=StepKind.FREEZE,
                what=self.what,
                duration_ns=now_ns - started_ns,
                detail=f"{self._mount.kind} frozen by FIFREEZE in "
                f"{(now_ns - self._begun_ns) / 1e6:.1f} ms",
            )
        self._watchdog.close()  # and with it the freeze, should it still come
        self._watchdog = None
        raise QuiesceError(f"{self.what} was not frozen: {self._why(answer)}")

    def _why(self, answer: dict[str, object] | None) -> str:
        failed = None if answer is None else answer.get("failed")
        if failed == errno.EBUSY:
            return "somebody else has frozen it already"
        if isinstance(failed, int) and failed != errno.ETIMEDOUT:
            return os.strerror(failed)
        if answer is not None and "thawed" in answer:
            return str(answer.get("why"))
        if failed == errno.ETIMEDOUT or (answer is not None and "late" in answer):
            return (
                f"writing out what it holds took longer than the limit of {self._limit_ms} ms; "
                "raise --freeze-limit or try again when less is written"
            )
        guard.thaw(self._mount.fd)
        return "its watchdog was killed"

    def end(self) -> QuiesceStep | None:
        """Thaw; tell who did it. None if it was never frozen."""
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is None:
            return None
        asked_ns = time.monotonic_ns()
        watchdog.send(thaw=True)
        answer = watchdog.receive(THAW_REPLY_S)
        watchdog.close()
        if answer is not None and "thawed" in answer:
            self.thawed_ns, code = int(answer["thawed"]), int(answer["errno"])
            why = str(answer["why"])
        else:
            # Its freezer thaws as soon as the guard is gone; when, only the kernel knows.
            self.thawed_ns, code, why = self._begun_ns, guard.thaw(self._mount.fd), "no watchdog"
        is_ok = why == "asked" and code == 0
        if why == "asked" and code != 0:
            self.shortfall = f"{self.what} was thawed by somebody else"
            self.thawed_ns = self._begun_ns
        elif not is_ok:
            self.shortfall = f"{self.what} was thawed early: {why}"
        return QuiesceStep(
            kind=StepKind.THAW,
            what=self.what,
            duration_ns=time.monotonic_ns() - asked_ns,
            is_ok=is_ok,
            detail=self.shortfall or f"held for {(self.thawed_ns - self._begun_ns) / 1e6:.1f} ms",
        )
