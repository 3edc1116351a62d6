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
        self._asked_ns: int | None = None
        self._why_thawed = ""
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
        if answer is not None and ("thawing" in answer or "thawed" in answer):
            return str(answer.get("why"))
        if failed == errno.ETIMEDOUT or (answer is not None and "late" in answer):
            return (
                f"writing out what it holds took longer than the limit of {self._limit_ms} ms; "
                "raise --freeze-limit or try again when less is written"
            )
        guard.thaw(self._mount.fd)
        return "its watchdog was killed"

    def ask_thaw(self) -> None:
        """Have it thaw; `thawed_ns` and `shortfall` are known then. Does not wait for the thaw.

        A thaw may write to its filesystem, and wait for that.
        """
        if self._watchdog is None or self._asked_ns is not None:
            return
        self._asked_ns = time.monotonic_ns()
        self._watchdog.send(thaw=True)
        answer = self._watchdog.receive(REPLY_S)
        if answer is not None and "thawing" in answer:
            self.thawed_ns, self._why_thawed = int(answer["thawing"]), str(answer["why"])
        else:
            # Its freezer thaws as soon as the guard is gone; when, only the kernel knows.
            self.thawed_ns, self._why_thawed = self._begun_ns, "no watchdog"
        if self._why_thawed != "asked":
            self.shortfall = f"{self.what} was thawed early: {self._why_thawed}"

    def end(self) -> QuiesceStep | None:
        """Thaw; tell who did it. None if it was never frozen."""
        self.ask_thaw()
        watchdog, self._watchdog = self._watchdog, None
        asked_ns = self._asked_ns
        if watchdog is None or asked_ns is None or self.thawed_ns is None:
            return None
        why = self._why_thawed
        answer = None if why == "no watchdog" else watchdog.receive(THAW_REPLY_S)
        watchdog.close()
        if answer is not None and "thawed" in answer:
            code = int(answer["errno"])
        else:
            code, why = guard.thaw(self._mount.fd), "no watchdog"
        is_ok = why == "asked" and code == 0
        if why == "asked" and code != 0:
            self.shortfall = f"{self.what} was thawed by somebody else"
            self.thawed_ns = self._begun_ns
        elif not is_ok and not self.shortfall:
            self.shortfall = f"{self.what} was thawed early: {why}"
            self.thawed_ns = self._begun_ns
        return QuiesceStep(
            kind=StepKind.THAW,
            what=self.what,
            duration_ns=time.monotonic_ns() - asked_ns,
            is_ok=is_ok,
            detail=self.shortfall or f"held for {(self.thawed_ns - self._begun_ns) / 1e6:.1f} ms",
        )
