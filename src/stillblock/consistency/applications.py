"""Let applications prepare for an instant: the server's side of hooks.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stillblock.consistency import hooks
from stillblock.consistency.watchdog import REPLY_S, Watchdog
from stillblock.errors import QuiesceError
from stillblock.model import QuiesceStep, StepKind

if TYPE_CHECKING:
    from collections.abc import Iterator

_REPLY_S: Final = 5.0
"""More than its limit a runner may take to say that it killed a hook."""


class Applications:
    """The hooks of a directory: `before` in `begin`, `after` from `let_go` to `end`."""

    def __init__(
        self, directory: Path, *, limit_ms: int, hold_ms: int, environment: dict[str, str]
    ) -> None:
        self._directory = directory
        self._limit_ms = limit_ms
        self._hold_ms = hold_ms
        self._environment = environment
        self._watchdog: Watchdog | None = None
        self._begun: list[Path] = []
        self._is_letting_go = False
        self._is_lost = False
        self.released_ns: int | None = None
        """When the first `after` began, on the monotonic clock; None while they hold still."""
        self.shortfall = ""
        """Why they did not hold still until they were asked; empty if they did."""
        self.failure = ""
        """Which did not come to a good end: what they held until then is in doubt."""
        self.steps: list[QuiesceStep] = []
        """What was run, also if `begin` failed."""

    def begin(self) -> None:
        """Run the hooks with `before`; raise `QuiesceError`, `after` having run, if one fails."""
        self._watchdog = Watchdog(
            "hooks.py",
            [str(self._directory), str(self._limit_ms), str(self._hold_ms)],
            environment=self._environment,
        )
        for message in self._messages():
            if message.get("ready"):
                return
            if "done" in message:
                failed = next((s for s in self.steps if not s.is_ok), None)
                why = f"hook {failed.what}: {failed.detail}" if failed else str(message["why"])
                self._watchdog.close()
                self._watchdog = None
                raise QuiesceError(f"the applications are not prepared: {why}")
        self._finish_alone()
        raise QuiesceError("the applications are not prepared: the process that runs hooks is gone")

    def probe(self) -> None:
        """Ask whether they still hold still; `released_ns` and `shortfall` are known then.

        Nobody goes on for that: a hook may write to a disk that has to wait for the answer.
        """
        if self._watchdog is None or self._is_letting_go:
            return
        self._watchdog.send(hold=True)
        while (message := self._watchdog.receive(REPLY_S)) is not None:
            if "holding" in message:
                return
            if "step" in message:
                self.steps.append(_step(message))
            if "ending" in message:
                self._is_letting_go = True
                self.released_ns = int(message["ending"])
                self.shortfall = f"hooks ended early: {message['why']}"
                return
        self._is_letting_go = True
        self._lose()

    def let_go(self) -> None:
        """Have the hooks begin with `after`, if they have not; then it is known who held still."""
        if self._watchdog is None or self._is_letting_go:
            return
        self._is_letting_go = True
        self._watchdog.send(after=True)
        for message in self._messages():
            if "ending" in message:
                self.released_ns = int(message["ending"])
                if message["why"] != "asked":
                    self.shortfall = f"hooks ended early: {message['why']}"
                return
        self._lose()

    def end(self) -> None:
        """Wait until every hook has run with `after`; `failure` is known then."""
        self.let_go()
        if self._watchdog is None:
            return
        if not self._is_lost:
            for message in self._messages():
                if "done" in message:
                    failed = [step.what for step in self.steps if not step.is_ok]
                    if failed:
                        self.failure = f"hooks failed after the instant: {', '.join(failed)}"
                    self._watchdog.close()
                    self._watchdog = None
                    return
            self.failure = "the process that runs hooks was killed"
        self._finish_alone()

    def _lose(self) -> None:
        """Nobody can say any more since when they go on, nor runs the rest of the hooks."""
        self._is_lost = True
        self.released_ns = 0
        self.shortfall = "the process that runs hooks was killed"

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Yield what the runner says, noting the steps, until it says nothing more."""
        watchdog = self._watchdog
        assert watchdog is not None
        while (message := watchdog.receive(self._limit_ms / 1000 + _REPLY_S)) is not None:
            if "starts" in message:
                self._begun.append(self._directory / str(message["starts"]))
            elif "step" in message:
                self.steps.append(_step(message))
            yield message

    def _finish_alone(self) -> None:
        """The runner is gone or stuck: what it began has to be ended from here."""
        assert self._watchdog is not None
        is_gone = self._watchdog.is_gone
        self._watchdog.close()
        self._watchdog = None
        if not is_gone:
            return  # it runs them itself once it goes on and finds our end closed
        environment = {**os.environ, **self._environment}
        try:
            environment |= hooks.settings(self._directory)
        except hooks.HooksError:
            pass  # it was right when the runner read it; without is better than not at all
        done = {step.what for step in self.steps if step.kind is StepKind.HOOK_AFTER}
        left = [hook for hook in self._begun if hook.name not in done]
        for message in hooks.run_after(left, environment, self._limit_ms):
            self.steps.append(_step(message))


def _step(message: dict[str, Any]) -> QuiesceStep:
    is_before = message["phase"] == "before"
    parts = (str(message["problem"]), str(message["said"]))
    return QuiesceStep(
        kind=StepKind.HOOK_BEFORE if is_before else StepKind.HOOK_AFTER,
        what=str(message["step"]),
        duration_ns=int(message["took_ns"]),
        is_ok=not message["problem"],
        detail="; ".join(filter(None, parts)),
    )
