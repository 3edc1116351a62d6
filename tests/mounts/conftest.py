"""Mounts of a test are undone whatever became of the test, and nothing is left on the machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mounted import clear, ours, require_fuse, require_mounts
from serving import MIB, Served, pattern, volume


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory to mount below."""
    with tempfile.TemporaryDirectory(prefix="sb-mnt-") as made:
        yield Path(made)
        clear(Path(made))
        assert ours(Path(made)) == ([], [])


@pytest.fixture
def served() -> Iterator[Served]:
    """A disk of 4 MiB, served; what was shown of it is gone in the end."""
    require_fuse()
    with volume(pattern(1, 4 * MIB)) as made:
        yield made.start()
        if made.process is not None:
            made.stop()
        clear(made.folder)


@pytest.fixture
def rooted() -> None:
    """Skip where mounts and loop devices are not allowed."""
    require_mounts()
