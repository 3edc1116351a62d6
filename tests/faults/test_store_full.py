"""The store runs full under a live disk: the disk goes on, the snapshot says what it lost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import MIB, Served, pattern, run, try_run
from stillblock.demo.nbd_client import NbdError

pytestmark = pytest.mark.slow

PIECE = 64 << 10
DISK_BYTES = 16 * MIB
WRITTEN = 12 * MIB


@pytest.fixture
def small_store(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 6 MiB."""
    if os.geteuid() != 0:
        pytest.skip("host: mounting a small filesystem needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    ran = try_run("mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder))
    if ran.code != 0:
        pytest.skip(f"host: mount is not allowed here: {ran.err.strip()}")
    yield folder / "store"
    run("umount", str(folder))


def readable(served: Served, snapshot: str, expected: bytes) -> int:
    """Return how many pieces can be read; each of them is right."""
    count = 0
    with served.client(snapshot) as client:
        for at in range(0, len(expected), PIECE):
            try:
                piece = client.pread(offset=at, length=PIECE)
            except NbdError:
                continue
            assert piece == expected[at : at + PIECE], f"other bytes at {at}"
            count += 1
    return count


def test_a_full_store_costs_the_snapshot_and_never_the_disk(small_store):
    before = pattern(50, DISK_BYTES)
    live = b"\x07" * WRITTEN + before[WRITTEN:]
    with tempfile.TemporaryDirectory(prefix="sb-") as folder:
        origin = Path(folder) / "disk.img"
        origin.write_bytes(before)
        served = Served(folder=Path(folder), origin=origin)
        served.cli("volume", "add", "web", "--origin", str(origin), "--store", str(small_store))
        served.start()
        try:
            served.snapshot("a")
            with served.client() as client:
                for at in range(0, WRITTEN, PIECE):
                    client.pwrite(b"\x07" * PIECE, offset=at)
                client.flush()
            assert served.read() == live
            assert "LOST" in served.cli("snapshot", "list", "web").out
            kept = readable(served, "a", before)
            # At least what was never written, and some of what was.
            assert (DISK_BYTES - WRITTEN) // PIECE < kept < DISK_BYTES // PIECE
            ran = served.try_cli("snapshot", "create", "web@b")
            assert ran.code != 0
            assert "full" in ran.err

            served.kill()
            served.start()
            assert served.read() == live
            assert readable(served, "a", before) == kept
            served.cli("snapshot", "delete", "web@a", "--yes")
            served.snapshot("c")
            assert served.read("c") == live
        finally:
            if served.process is not None:
                assert served.stop().code == 0
        assert origin.read_bytes() == live
