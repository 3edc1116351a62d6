"""A figure from several rounds: its median, and how far the rounds let us trust it."""

import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

RESAMPLE_COUNT = 2000
SEED = 7
"""Fixed, so that the same results file always prints the same interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A median over the rounds with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    round_count: int


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """The median and its interval, of no width for one round; None without a single value."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    draw = random.Random(SEED)
    medians = sorted(
        statistics.median(draw.choices(present, k=len(present))) for _ in range(RESAMPLE_COUNT)
    )
    return Estimate(
        median=statistics.median(present),
        low=medians[int(RESAMPLE_COUNT * 0.025)],
        high=medians[int(RESAMPLE_COUNT * 0.975) - 1],
        round_count=len(present),
    )


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is there; None without a single value."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def rank(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed (nearest rank)."""
    assert values
    assert 0 < share <= 1
    ordered = sorted(values)
    # The subtraction keeps 0.99 * 100 = 99.00000000000001 from counting as 100.
    position = -int(-(share * len(ordered) - 1e-9) // 1)
    return ordered[max(position, 1) - 1]
