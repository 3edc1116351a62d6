"""What an examination of this system finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    MISSING = "missing"
    """Something useful is not there; everything else works."""
    WARNING = "warning"
    """Nothing is broken yet; somebody should do something."""
    BROKEN = "broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding."""

    name: str
    level: Level
    finding: str
    advice: str = ""
