"""One served disk that every client looks at, and a fresh one for those that write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from filesystems import make_disk
from serving import BLOCK, MIB, Served, pattern, run, volume

EXCLUDED = slice(1 * MIB, 2 * MIB)
CHANGED = slice(4 * BLOCK, 8 * BLOCK)
"""Written between monday and tuesday."""
ZEROED = slice(3 * MIB, 3 * MIB + 16 * BLOCK)
"""Zeroed between them."""


@pytest.fixture
def served() -> Iterator[Served]:
    """A fresh 4 MiB disk, served."""
    with volume(pattern(1, 4 * MIB)) as made:
        yield made.start()


@pytest.fixture(scope="package")
def week() -> Iterator[tuple[Served, dict[str, bytes]]]:
    """A disk with two snapshots, and what each export holds; nobody writes to it any more."""
    with volume(pattern(2, 4 * MIB)) as made:
        made.start()
        live = bytearray(made.origin.read_bytes())
        made.snapshot("monday", "--exclude", "1MiB-2MiB")
        monday = bytearray(live)
        monday[EXCLUDED] = bytes(MIB)
        with made.client() as client:
            client.pwrite(pattern(3, 4 * BLOCK), offset=CHANGED.start)
            live[CHANGED] = pattern(3, 4 * BLOCK)
            client.pwrite(pattern(4, BLOCK), offset=EXCLUDED.start)
            live[EXCLUDED.start : EXCLUDED.start + BLOCK] = pattern(4, BLOCK)
        run("qemu-io", "-f", "raw", "-c", f"write -z -u {ZEROED.start} 64k", made.uri())
        live[ZEROED] = bytes(16 * BLOCK)
        made.snapshot("tuesday")
        tuesday = bytes(live)
        with made.client() as client:
            client.pwrite(pattern(5, BLOCK), offset=0)
            live[:BLOCK] = pattern(5, BLOCK)
        yield made, {"web": bytes(live), "monday": bytes(monday), "tuesday": tuesday}


@pytest.fixture(scope="session")
def many_filesystems(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """`many_filesystems(path)`: a fresh copy of the disk that `filesystems` makes."""
    made = tmp_path_factory.mktemp("filesystems") / "disk.img"

    def copy_to(path: Path) -> Path:
        if not made.exists():
            make_disk(made)
        run("cp", "--sparse=always", str(made), str(path))
        return path

    return copy_to


@pytest.fixture(scope="session")
def nbdsh() -> Callable[..., list[str]]:
    """`nbdsh(script, *arguments)`: the lines a libnbd script prints, in the system's Python."""

    def runner(script: str, *arguments: str) -> list[str]:
        # Not `nbdsh -c`: its -c options share no scope with functions that they define.
        return run("/usr/bin/python3", "-c", script, *arguments).out.splitlines()

    return runner
