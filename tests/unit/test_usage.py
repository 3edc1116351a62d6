"""How near a store is to being full, in words."""

import pytest

from stillblock.errors import UsageError
from stillblock.model import OnFull, StoreUsage, UsageLevel
from stillblock.operations.usage import check_limit, describe, usage_level


@pytest.mark.parametrize(
    ("percent", "level"),
    [
        (0, UsageLevel.OK),
        (79, UsageLevel.OK),
        (80, UsageLevel.WARNING),
        (94, UsageLevel.WARNING),
        (95, UsageLevel.CRITICAL),
        (100, UsageLevel.CRITICAL),
    ],
)
def test_warnings_begin_at_80_and_95_percent(percent, level):
    assert usage_level(percent=percent, is_full=False) is level


def test_no_room_and_failure_say_more_than_percent():
    assert usage_level(percent=10, is_full=True) is UsageLevel.FULL
    assert usage_level(percent=10, is_full=True, failure="EIO") is UsageLevel.FAILED


@pytest.mark.parametrize("level", list(UsageLevel))
def test_a_warning_says_what_how_much_and_what_now(level):
    usage = StoreUsage(
        volume="web",
        on_full=OnFull.HOLD,
        limit_bytes=None,
        used_bytes=1 << 30,
        capacity_bytes=1 << 30,
        percent=100,
        level=level,
        held_writes=3,
        failure="input/output error",
    )
    text = describe(usage)
    if level is UsageLevel.OK:
        assert text == ""
    else:
        assert text.startswith("web: the store ")
        assert "3 writes wait" in text
        assert "delete a snapshot" in text


def test_a_limit_that_no_store_could_keep_is_refused():
    check_limit(0)
    check_limit(4 << 20)
    with pytest.raises(UsageError, match="at least 4 MiB"):
        check_limit((4 << 20) - 1)
