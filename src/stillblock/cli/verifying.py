"""`snapshot verify`, and `--verify` of `snapshot create`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stillblock.cli.output import Output, counted
from stillblock.errors import ExitCode
from stillblock.model import CheckOutcome, format_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stillblock.cli.options import Common
    from stillblock.model import SnapshotVerification
    from stillblock.service.verifying import Verified

EXIT_CODES: Final = {
    CheckOutcome.SOUND: ExitCode.OK,
    CheckOutcome.UNCHECKED: ExitCode.PARTIAL,
    CheckOutcome.DAMAGED: ExitCode.DAMAGE,
}
_COLUMNS: Final = ("PLACE", "FILESYSTEM", "OUTCOME", ">TOOK", "WHAT WAS SAID")


def verify_and_tell(
    output: Output, common: Common, volume: str, snapshot: str, command: Sequence[str]
) -> int:
    """Verify a snapshot, print what was found and return the exit code."""
    from stillblock.service.verifying import verify_snapshot  # noqa: PLC0415 - only to verify

    text = f"verifying {volume}@{snapshot} on a clone"
    with output.working(text) as say:
        found = verify_snapshot(
            common.config(),
            volume,
            snapshot,
            command=command,
            told=lambda what: say(f"{text}: {what}"),
        )
    output.result("verification", found, lambda out: _render(out, found))
    return EXIT_CODES[found.verification.outcome]


def _render(out: Output, found: Verified) -> None:
    table(out, found.verification)
    out.line(f"{found.snapshot.reference}: {summary(found.verification)}")


def table(out: Output, found: SnapshotVerification) -> None:
    """Print what each filesystem came to."""
    out.table(
        _COLUMNS,
        [
            (
                check.place,
                check.content,
                _word(check.outcome),
                format_duration(check.duration_ms * 1_000_000),
                check.detail,
            )
            for check in found.checks
        ],
        empty="",
    )


def summary(found: SnapshotVerification) -> str:
    """Return in a few words what a verification found."""
    by_outcome = [
        f"{counted(count, 'filesystem')} {_word(outcome)}"
        for outcome in reversed(CheckOutcome)
        if (count := sum(check.outcome is outcome for check in found.checks if check.content))
    ]
    return ", ".join(by_outcome) or "nothing on it could be checked"


def _word(outcome: CheckOutcome) -> str:
    if outcome is CheckOutcome.DAMAGED:
        return "DAMAGED"
    return "left out" if outcome is CheckOutcome.LEFT_OUT else str(outcome)
