"""Freeze the filesystems of a guest around an instant: the server's side of agent.py."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from stillblock.consistency import agent
from stillblock.consistency.watchdog import REPLY_S, THAW_REPLY_S, Watchdog
from stillblock.errors import QuiesceError
from stillblock.model import QuiesceStep, StepKind

if TYPE_CHECKING:
    from pathlib import Path


class GuestFreeze:
    """A guest's filesystems, frozen from `begin` until `end`."""

    def __init__(self, path: Path, *, mounts: tuple[str, ...], limit_ms: int) -> None:
        self._path = path
        self._mounts = mounts
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
        """The agent's socket."""
        return str(self._path)

    def begin(self) -> QuiesceStep:
        """Freeze; raise `QuiesceError`, with thawing under way, if that fails."""
        started_ns = time.monotonic_ns()
        watchdog = Watchdog("agent.py", [self.what, str(self._limit_ms), *self._mounts])
        answer = watchdog.receive(self._limit_ms / 1000 + REPLY_S)
        if answer is None or "frozen" not in answer:
            is_gone = watchdog.is_gone
            watchdog.close()
            if is_gone:
                agent.thaw(self.what, for_s=THAW_REPLY_S)
            why = "its watchdog did not answer" if answer is None else answer.get("failed")
            raise QuiesceError(f"the guest of {self.what} was not frozen: {why}")
        self._watchdog = watchdog
        self._begun_ns = int(answer["frozen"])
        named = ", ".join(self._mounts)
        return QuiesceStep(
            kind=StepKind.FREEZE,
            what=self.what,
            duration_ns=time.monotonic_ns() - started_ns,
            detail=f"the guest agent froze {answer['count']} filesystems"
            + (f" ({named})" if named else ""),
        )

    def ask_thaw(self) -> None:
        """Have it thaw; `thawed_ns` and `shortfall` are known then. Does not wait for the thaw.

        The guest may write before it answers, and wait for that.
        """
        if self._watchdog is None or self._asked_ns is not None:
            return
        self._asked_ns = time.monotonic_ns()
        self._watchdog.send(thaw=True)
        answer = self._watchdog.receive(REPLY_S)
        if answer is not None and "thawing" in answer:
            self.thawed_ns, self._why_thawed = int(answer["thawing"]), str(answer["why"])
        else:
            self.thawed_ns, self._why_thawed = self._begun_ns, "no watchdog"
        if self._why_thawed != "asked":
            self.shortfall = f"the guest of {self.what} was thawed early: {self._why_thawed}"

    def end(self) -> QuiesceStep | None:
        """Thaw; tell who did it. None if it was never frozen."""
        self.ask_thaw()
        watchdog, self._watchdog = self._watchdog, None
        asked_ns = self._asked_ns
        if watchdog is None or asked_ns is None or self.thawed_ns is None:
            return None
        answer = watchdog.receive(THAW_REPLY_S)
        is_gone = watchdog.is_gone
        watchdog.close()
        if answer is not None and "thawed" in answer:
            why, problem = str(answer["why"]), str(answer["problem"])
        else:
            self.thawed_ns, why = self._begun_ns, "no watchdog"
            # One that is there and still asks goes on asking.
            problem = "the guest agent does not answer"
            if is_gone:
                problem = agent.thaw(self.what, for_s=THAW_REPLY_S)
        if why != "asked" and not self.shortfall:
            self.shortfall = f"the guest of {self.what} was thawed early: {why}"
        detail = self.shortfall or f"held for {(self.thawed_ns - self._begun_ns) / 1e6:.1f} ms"
        if problem:
            detail += f"; NOT KNOWN TO BE THAWED: {problem}"
        return QuiesceStep(
            kind=StepKind.THAW,
            what=self.what,
            duration_ns=time.monotonic_ns() - asked_ns,
            is_ok=why == "asked" and not problem,
            detail=detail,
        )
