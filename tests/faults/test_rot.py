"""Bit rot in a store: every block of every snapshot is exact or an error, and none vanishes."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillblock import native
from stillblock.errors import (
    RecoveryNeededError,
    StillblockError,
    StoreDamagedError,
    UnsupportedVersionError,
)

pytestmark = pytest.mark.slow

BLOCK = 4096
BLOCKS = 64
SEED = 20_261
WHOLE = ((0, BLOCKS * BLOCK),)
PART = ((8 * BLOCK, 40 * BLOCK),)
BATCH_HEADER_BYTES = 64
COVERED_BYTES = 60
"""Of the shortest header that is there twice: checksums do not cover the padding behind it."""
FLIPS_A_STRUCTURE = 6
"""Random bits of each header, batch and record: some 400 damaged stores in all."""


@dataclass(frozen=True)
class Clean:
    """A store that was closed cleanly, and what every snapshot in it holds."""

    folder: Path
    live: bytes
    snapshots: dict[int, tuple[bytes, tuple[tuple[int, int], ...]]]

    @property
    def segments(self) -> list[Path]:
        return sorted((self.folder / "store" / "log").iterdir())


def content(rng: random.Random, blocks: int = 1) -> bytes:
    return rng.randbytes(blocks * BLOCK)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    folder = tmp_path_factory.mktemp("rot")
    rng = random.Random(SEED)
    live = bytearray(content(rng, BLOCKS))
    origin, store = folder / "disk.img", folder / "store"
    origin.write_bytes(live)
    native.create_volume(store=store, origin=origin, block_size=BLOCK, meta=b"rot")
    volume = open_volume(folder)
    snapshots = {}

    def take(name: str, selection) -> None:
        taken = volume.snapshot(selection=selection, meta=b"", pause_limit_ms=2000)
        volume.set_epoch_meta(epoch=taken.epoch, meta=name.encode())
        snapshots[taken.epoch] = (bytes(live), selection)

    def write(block: int, count: int = 1) -> None:
        data = content(rng, count)
        volume.pwrite(data, offset=block * BLOCK)
        live[block * BLOCK : (block + count) * BLOCK] = data
        volume.flush()  # a batch of its own

    take("a", WHOLE)
    for block in (1, 9, 10, 30):
        write(block)
    take("b", PART)
    write(9, 4)
    write(50, 2)
    take("c", WHOLE)
    write(9)
    volume.delete_snapshot(epoch=2)
    take("d", PART)  # nothing changes after it: a header, and no batch
    volume.close()
    del snapshots[2]
    return Clean(folder=folder, live=bytes(live), snapshots=snapshots)


@pytest.fixture
def damaged(clean: Clean, tmp_path: Path) -> Callable[[], Path]:
    """Make a fresh copy of the store and the origin in the same place, and return where."""

    def again() -> Path:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(clean.folder, folder)
        return folder

    return again


def open_volume(folder: Path, recover: native.Recovery = "refuse") -> native.Volume:
    return native.Volume.open(
        folder / "store", origin=folder / "disk.img", cache="writethrough", recover=recover
    )


def try_open(folder: Path) -> native.Volume | None:
    """Open, or be told clearly that it cannot be."""
    try:
        return open_volume(folder)
    except RecoveryNeededError:  # the last record is gone: nobody knows that it was closed
        return open_volume(folder, "discard")
    except StoreDamagedError:
        return None


def check_snapshots(volume: native.Volume, clean: Clean) -> int:
    """All are there, every block is right or an error. Return how many blocks are errors."""
    listed = {e.epoch: e for e in volume.epochs() if e.has_snapshot}
    assert listed.keys() == clean.snapshots.keys(), "a snapshot vanished"
    errors = 0
    for epoch, (expected, selection) in clean.snapshots.items():
        if listed[epoch].damage:
            with pytest.raises(StoreDamagedError):
                volume.view(epoch=epoch, excluded_reads="error")
            errors += BLOCKS
            continue
        assert volume.selection(epoch=epoch) == selection
        view = volume.view(epoch=epoch, excluded_reads="error")
        for start, end in selection:
            for at in range(start, end, BLOCK):
                try:
                    data = view.pread(offset=at, length=BLOCK)
                except StillblockError:
                    errors += 1
                else:
                    assert data == expected[at : at + BLOCK], f"other bytes: {epoch=} {at=}"
        view.close()
    return errors


def check_damaged(folder: Path, clean: Clean) -> int | None:
    """What must hold of any store, whatever is damaged in it; None: it says that it is damaged."""
    volume = try_open(folder)
    if volume is None:
        assert (folder / "disk.img").read_bytes() == clean.live
        return None
    assert volume.pread(offset=0, length=len(clean.live)) == clean.live
    errors = check_snapshots(volume, clean)
    # First changes on top of it: none may be taken for one whose record is gone.
    live = content(random.Random(SEED + 1), BLOCKS)
    volume.pwrite(live, offset=0)
    volume.flush()
    check_snapshots(volume, clean)
    taken = volume.snapshot(selection=WHOLE, meta=b"new", pause_limit_ms=2000)
    view = volume.view(epoch=taken.epoch)
    volume.pwrite(bytes(len(live)), offset=0)
    assert view.pread(offset=0, length=len(live)) == live
    view.close()
    volume.delete_snapshot(epoch=taken.epoch)
    volume.close()
    again = open_volume(folder)
    assert again.pread(offset=0, length=len(live)) == bytes(len(live))
    check_snapshots(again, clean)
    again.close()
    return errors


def flip(path: Path, *bits: int) -> None:
    data = bytearray(path.read_bytes())
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def written_pages(path: Path) -> Iterator[int]:
    """Return where there is anything: segments are sparse and padded."""
    data = path.read_bytes()
    for at in range(0, len(data), BLOCK):
        if any(data[at : at + BLOCK]):
            yield at


def test_a_store_without_rot_is_exact(clean, damaged):
    assert check_damaged(damaged(), clean) == 0


def test_one_flipped_bit_anywhere_in_the_log_is_no_other_byte_of_any_snapshot(clean, damaged):
    rng = random.Random(SEED)
    cases = costly = 0
    for segment in clean.segments:
        for page in written_pages(segment):
            spans = [(0, BATCH_HEADER_BYTES), (BATCH_HEADER_BYTES, 512), (512, BLOCK)]
            for low, high in spans[: 3 if cases % 3 == 0 else 2]:
                bit = (page + rng.randrange(low, high)) * 8 + rng.randrange(8)
                folder = damaged()
                flip(folder / "store" / "log" / segment.name, bit)
                errors = check_damaged(folder, clean)
                assert errors is not None, "one bit of the log costs one block, not the store"
                # Everything but payload is there twice.
                assert errors <= 3, f"{segment.name} bit {bit}: {errors} blocks gone"
                costly += errors > 0
                cases += 1
    assert cases > 40
    assert costly, "not one flip hit a payload: the test would prove nothing"


def test_any_rot_in_both_copies_of_a_header_or_batch_costs_blocks_and_is_told(clean, damaged):
    """Both copies of each: the same bit of every pair of equal pages."""
    rng = random.Random(SEED + 2)
    cases = 0
    for segment in clean.segments:
        data = segment.read_bytes()
        pages = {}
        for at in written_pages(segment):
            key = data[at + 4 : at + BLOCK]  # beyond the magic, which tells head from tail
            pages.setdefault(key, []).append(at)
        for places in pages.values():
            for _ in range(FLIPS_A_STRUCTURE if len(places) == 2 else 0):
                bit = rng.randrange(COVERED_BYTES) * 8 + rng.randrange(8)
                folder = damaged()
                path = folder / "store" / "log" / segment.name
                flip(path, *(at * 8 + bit for at in places))
                errors = check_damaged(folder, clean)
                assert errors != 0, f"{segment.name} {places} bit {bit}: nothing was told"
                cases += 1
    assert cases > 40


def test_a_snapshot_whose_headers_are_both_gone_is_listed_as_damaged(clean, damaged):
    for segment in clean.segments:
        folder = damaged()
        path = folder / "store" / "log" / segment.name
        flip(path, 0, 2 * BLOCK * 8)  # the magic of both copies: one page of header, one of epoch
        volume = open_volume(folder)
        gone = [e for e in volume.epochs() if e.damage]
        if not gone:  # the deleted one
            continue
        assert "header" in gone[0].damage
        assert gone[0].meta in {b"a", b"c", b"d"}, "what the journal says of it is kept"
        volume.delete_snapshot(epoch=gone[0].epoch)
        volume.close()
        volume = open_volume(folder)
        assert gone[0].epoch not in {e.epoch for e in volume.epochs()}
        volume.close()


def test_one_flipped_bit_anywhere_in_the_journal_is_told_or_without_effect(clean, damaged):
    rng = random.Random(SEED + 3)
    size = len((clean.folder / "store" / "journal").read_bytes().rstrip(b"\0"))
    refused = 0
    for record in range(0, size, 512):
        for offset in (rng.randrange(28), rng.randrange(28, 64), rng.randrange(64, 512)):
            folder = damaged()
            flip(folder / "store" / "journal", (record + offset) * 8 + rng.randrange(8))
            refused += check_damaged(folder, clean) is None
    assert refused > 5


def test_a_journal_that_is_damaged_says_what_to_do(damaged):
    folder = damaged()
    flip(folder / "store" / "journal", 40 * 8)
    with pytest.raises(StoreDamagedError, match=r"journal is damaged at byte 0.*origin"):
        open_volume(folder)


@pytest.mark.parametrize("version", [2, 3, 0x8001, 1 << 30])
def test_a_rotten_version_is_damage_and_not_a_newer_one(clean, damaged, version):
    """One flipped bit of the version once looked like a store of a newer program: refused whole."""
    folder = damaged()
    path = folder / "store" / "log" / clean.segments[0].name
    data = bytearray(path.read_bytes())
    data[8:12] = version.to_bytes(4, "little")
    path.write_bytes(data)
    try:
        assert check_damaged(folder, clean) == 0  # the second copy serves
    except UnsupportedVersionError:
        pytest.fail("a damaged header was taken for a newer version")


def test_a_log_that_lost_its_end_stays_damaged_when_it_is_opened_again(clean, damaged):
    """The end of a log is known from the record of the last stop only, which the next one replaces.

    What was gone then read as what the origin holds now: other bytes (P2).
    """
    folder = damaged()
    segment = folder / "store" / "log" / clean.segments[2].name
    for later in clean.segments[3:]:
        (folder / "store" / "log" / later.name).unlink()
    os.truncate(segment, 4 * BLOCK)
    for _ in range(3):
        volume = open_volume(folder)
        assert check_snapshots(volume, clean) > 0
        volume.close()
