"""How each filesystem is checked on a clone of its snapshot, and what the exit codes mean. Pure.

The steps do what a start after a power cut does: the journal is replayed and what is always open
then is put in order. After that the filesystem's own checker must have nothing to complain about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stillblock.model import CheckOutcome

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckStep:
    """One command on the image; codes that are in neither set say that something is damaged."""

    command: tuple[str, ...]
    """Without the image, which comes last."""
    good: frozenset[int]
    unable: frozenset[int]
    """It could not do its work, and says nothing of the filesystem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HowToCheck:
    """How a family of filesystems is checked."""

    steps: tuple[CheckStep, ...]
    package: str
    """Debian's package with the commands."""
    is_replayed_by_kernel: bool = False
    """Its journal is replayed by mounting it for a moment, which needs root."""
    note: str = ""
    """What the commands do not look at."""


def _step(*command: str, good: Sequence[int] = (0,), unable: Sequence[int] = ()) -> CheckStep:
    return CheckStep(command=command, good=frozenset(good), unable=frozenset(unable))


_E2FSCK_UNABLE: Final = (8, 16, 32, 128)
"""e2fsck(8): operational error, usage, cancelled, shared library. They come added to others."""
_HOW: Final[dict[str, HowToCheck]] = {
    "ext": HowToCheck(
        steps=(
            # Replays the journal and the list of orphans; changes nothing that needs a decision.
            _step("e2fsck", "-f", "-p", good=(0, 1), unable=_E2FSCK_UNABLE),
            _step("e2fsck", "-f", "-n", unable=_E2FSCK_UNABLE),
        ),
        package="e2fsprogs",
    ),
    "xfs": HowToCheck(
        # xfs_repair(8): 1, it cannot go on; 2, there is a journal to replay; 4, by -e, damage.
        steps=(_step("xfs_repair", "-f", "-e", unable=(1, 2)),),
        package="xfsprogs",
        is_replayed_by_kernel=True,
    ),
    "btrfs": HowToCheck(
        steps=(_step("btrfs", "check", "--readonly"),),
        package="btrfs-progs",
        is_replayed_by_kernel=True,
    ),
    "ntfs": HowToCheck(
        steps=(_step("ntfsfix", "--no-action"),),
        package="ntfs-3g",
        note="its boot sector and the beginning of its MFT only",
    ),
    "fat": HowToCheck(
        steps=(
            _step("fsck.fat", "-a", good=(0, 1), unable=(2,)),
            _step("fsck.fat", "-n", unable=(2,)),
        ),
        package="dosfstools",
    ),
    "exfat": HowToCheck(
        steps=(
            _step("fsck.exfat", "-p", good=(0, 1), unable=(8, 16)),
            _step("fsck.exfat", "-n", unable=(8, 16)),
        ),
        package="exfatprogs",
    ),
}


def how_to_check(content: str | None) -> HowToCheck | None:
    """Return how a filesystem of this family is checked; None: nobody here can."""
    return None if content is None else _HOW.get(content)


def outcome_of(step: CheckStep, exit_code: int) -> CheckOutcome:
    """Return what a step's exit code says of the filesystem."""
    if exit_code in step.good:
        return CheckOutcome.SOUND
    # A negative one is a signal: whatever it was about, the checker did not end.
    if exit_code < 0 or exit_code in step.unable:
        return CheckOutcome.UNCHECKED
    if step.command[0] == "e2fsck" and any(exit_code & code for code in _E2FSCK_UNABLE):
        return CheckOutcome.UNCHECKED
    return CheckOutcome.DAMAGED
