"""Medians, their intervals and ranks."""

import pytest

from bench.estimate import estimate, median, rank


def test_estimate_of_nothing_is_nothing():
    assert estimate([]) is None
    assert estimate([None, None]) is None


def test_one_round_gives_an_interval_of_no_width():
    found = estimate([3.0])
    assert found is not None
    assert (found.median, found.low, found.high, found.round_count) == (3.0, 3.0, 3.0, 1)


def test_interval_holds_the_median_and_stays_within_the_values():
    found = estimate([4.0, 1.0, 3.0, 5.0, 2.0])
    assert found is not None
    assert found.median == 3.0
    assert 1.0 <= found.low <= 3.0 <= found.high <= 5.0
    assert found.low < found.high


def test_the_same_rounds_always_print_the_same_interval():
    rounds = [1.2, 1.9, 1.4, 1.1, 1.6]
    assert estimate(rounds) == estimate(rounds)


def test_missing_rounds_do_not_count():
    found = estimate([2.0, None, 4.0])
    assert found is not None
    assert (found.median, found.round_count) == (3.0, 2)


def test_median_of_nothing_is_nothing():
    assert median([None]) is None


@pytest.mark.parametrize(
    ("share", "expected"), [(0.01, 1), (0.5, 50), (0.99, 99), (0.991, 100), (1.0, 100)]
)
def test_rank_is_the_smallest_value_that_the_share_does_not_exceed(share, expected):
    assert rank([float(value) for value in range(100, 0, -1)], share) == expected


def test_rank_of_a_small_sample_is_its_largest_value_for_high_shares():
    assert rank([5.0, 1.0, 3.0], 0.99) == 5.0
