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


@pytest.fixture(scope="module")
def disk_of_module() -> Iterator[Served]:
    require_fuse()
    with volume(pattern(1, 4 * MIB)) as made:
        yield made.start()
        if made.process is not None:
            made.stop()
        clear(made.folder)


@pytest.fixture
def served(disk_of_module: Served, place: Path) -> Iterator[Served]:
    """A disk of 4 MiB, served, without snapshots; what is mounted below `place` goes before it."""
    yield disk_of_module
    for point in ours(place)[0]:
        disk_of_module.here("unmount", point, "--force")
    with disk_of_module.session() as session:
        for snapshot in session.list_snapshots().snapshots:
            session.delete_snapshot(snapshot.id, force=True)


@pytest.fixture
def rooted() -> None:
    """Skip where mounts and loop devices are not allowed."""
    require_mounts()
