"""Checked access to parsed JSON, so that no untyped value travels further than its parser."""

import json
from collections.abc import Mapping
from typing import cast

from bench.errors import PeerError


def mapping(value: object, what: str) -> Mapping[str, object]:
    """The value as an object with string keys, or PeerError naming what was read."""
    if not isinstance(value, dict):
        raise PeerError(f"{what}: expected an object, found {type(value).__name__}")
    return cast("Mapping[str, object]", value)


def sequence(value: object, what: str) -> list[object]:
    """The value as a list, or PeerError naming what was read."""
    if not isinstance(value, list):
        raise PeerError(f"{what}: expected a list, found {type(value).__name__}")
    return cast("list[object]", value)


def number(value: object, what: str) -> float:
    """The value as a number, or PeerError naming what was read."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PeerError(f"{what}: expected a number, found {type(value).__name__}")
    return float(value)


def numbers(printed: str, what: str) -> dict[str, float]:
    """The fields of a printed JSON object, all of them numbers, or PeerError."""
    return {key: number(value, key) for key, value in mapping(json.loads(printed), what).items()}


def integer(value: object, what: str) -> int:
    """The value as a whole number, or PeerError naming what was read."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise PeerError(f"{what}: expected a whole number, found {type(value).__name__}")
    return value


def text(value: object, what: str) -> str:
    """The value as a string, or PeerError naming what was read."""
    if not isinstance(value, str):
        raise PeerError(f"{what}: expected a string, found {type(value).__name__}")
    return value
