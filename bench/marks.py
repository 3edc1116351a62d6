"""Figures with the most they may be, and the steps that lead to them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from bench.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A figure and the most it may be; None for a figure that is only shown."""

    what: str
    figure: float
    most: float | None

    @property
    def is_kept(self) -> bool:
        return self.most is None or self.figure <= self.most


def mark_table(title: str, marks: Sequence[Mark]) -> Table:
    """One line a figure, with its verdict if it has one."""
    rows = [("figure", "measured", "at most", "verdict")]
    for mark in marks:
        most = "-" if mark.most is None else f"{mark.most:.4g}"
        verdict = "-" if mark.most is None else "pass" if mark.is_kept else "short"
        rows.append((mark.what, f"{mark.figure:.4g}", most, verdict))
    return Table(title=title, rows=tuple(rows))


def say(line: str) -> None:
    """Tell what is being done now, beside the table."""
    print(f"# {line}", file=sys.stderr, flush=True)
