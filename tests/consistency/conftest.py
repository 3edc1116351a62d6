"""A volume that this process has open, for what needs no server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import stillblock

SIZE = 4 << 20


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[stillblock.Volume]:
    origin = tmp_path / "disk.img"
    origin.write_bytes(bytes(SIZE))
    stillblock.create("web", origin=origin)
    with stillblock.open("web") as opened:
        yield opened
