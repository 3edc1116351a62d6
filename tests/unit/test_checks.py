"""What exit codes of checkers say, and what many outcomes come to."""

from __future__ import annotations

import pytest

from stillblock.model import CheckOutcome
from stillblock.mounting.checks import how_to_check, outcome_of
from stillblock.operations.checking import worst

SOUND, DAMAGED = CheckOutcome.SOUND, CheckOutcome.DAMAGED
UNCHECKED, LEFT_OUT = CheckOutcome.UNCHECKED, CheckOutcome.LEFT_OUT


@pytest.mark.parametrize(
    ("content", "step", "code", "expected"),
    [
        ("ext", 0, 1, SOUND),  # put in order, as at every start
        ("ext", 0, 4, DAMAGED),
        ("ext", 1, 1, DAMAGED),
        ("ext", 1, 12, UNCHECKED),  # errors left, and an operational error
        ("xfs", 0, 2, UNCHECKED),  # a journal that nobody replayed
        ("xfs", 0, 4, DAMAGED),
        ("btrfs", 0, 1, DAMAGED),
        ("fat", 0, 1, SOUND),
        ("fat", 1, 1, DAMAGED),
        ("ntfs", 0, -9, UNCHECKED),  # killed: it did not end
    ],
)
def test_an_exit_code_says_what_its_manual_says(content, step, code, expected):
    how = how_to_check(content)
    assert how is not None
    assert outcome_of(how.steps[step], code) is expected


def test_what_nobody_can_check_has_no_commands():
    assert how_to_check("zfs") is None
    assert how_to_check(None) is None


def test_many_outcomes_come_to_the_worst_and_nothing_at_all_to_no_good_word():
    assert worst((SOUND, DAMAGED, UNCHECKED)) is DAMAGED
    assert worst((SOUND, UNCHECKED)) is UNCHECKED
    assert worst((LEFT_OUT, SOUND)) is SOUND
    assert worst((LEFT_OUT,)) is UNCHECKED
    assert worst(()) is UNCHECKED
