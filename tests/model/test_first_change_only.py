"""What is kept and what it costs: a block once, whoever needs it; nothing for the rest (P3, P4)."""

from __future__ import annotations

import random

import pytest

from model.volumes import (
    log_allocated_bytes,
    make_volume,
    open_volume,
    read_snapshot,
    scratch,
    take,
)

BLOCK = 4096
MIB = 1 << 20
BATCH_BLOCKS = 1020
RECORD_BYTES_MAX = 64
"""What a preserved block may cost beside itself, in full batches."""
SEAL_BYTES_MAX = 2 * BLOCK
"""What a deletion adds to the log before it punches holes into it."""


def preserved(volume) -> int:
    counters = volume.statistics()
    return counters["preserved_blocks"] + counters["preserved_zero_blocks"]


@pytest.mark.parametrize("snapshots", [1, 8])
def test_a_thousand_writes_to_one_block_preserve_it_once(snapshots):
    with scratch() as folder:
        before = random.Random(1).randbytes(64 * BLOCK)
        volume = make_volume(folder, before)
        epochs = [take(volume) for _ in range(snapshots)]
        empty = volume.store_bytes()
        dice = random.Random(2)
        for number in range(1000):
            offset = 5 * BLOCK + dice.randrange(BLOCK)
            size = min(dice.randrange(1, BLOCK + 1), 6 * BLOCK - offset)
            volume.pwrite(bytes([number % 256]) * size, offset=offset)
            if number % 100 == 0:
                volume.flush()
        volume.flush()
        assert preserved(volume) == 1
        assert volume.store_bytes() - empty <= 4 * BLOCK  # the block, and the frame of its batch
        for epoch in epochs:
            assert read_snapshot(volume, epoch) == before
        volume.close()


@pytest.mark.parametrize("snapshots", [1, 8])
@pytest.mark.parametrize("first", ["write", "trim", "zeroes", "zeroes without holes", "scattered"])
def test_the_log_grows_by_a_block_and_64_bytes_for_each_first_change(snapshots, first):
    blocks = 8 * BATCH_BLOCKS
    with scratch() as folder:
        before = random.Random(3).randbytes(blocks * BLOCK)
        volume = make_volume(folder, before)
        epochs = [take(volume) for _ in range(snapshots)]
        empty = volume.store_bytes()
        size = blocks * BLOCK
        match first:
            case "trim":
                volume.trim(offset=0, length=size)
                assert preserved(volume) == 0  # a discard costs no copy
            case "zeroes":
                volume.write_zeroes(offset=0, length=size)
            case "zeroes without holes":
                volume.write_zeroes(offset=0, length=size, may_punch=False)
            case "scattered":
                order = list(range(blocks))
                random.Random(4).shuffle(order)
                for block in order:
                    volume.pwrite(b"\x01" * 512, offset=block * BLOCK + 512)
        volume.pwrite(b"\x02" * size, offset=0)
        volume.flush()
        assert preserved(volume) == blocks
        # Scattered writes go in batches of what came in 50 ms or 1 MiB: some pages more for each.
        overhead = volume.store_bytes() - empty - size
        batches = volume.statistics()["batches"]
        if first == "scattered":
            assert overhead <= blocks * RECORD_BYTES_MAX + batches * 3 * BLOCK
        else:
            assert overhead <= blocks * RECORD_BYTES_MAX
        again = volume.store_bytes()
        volume.pwrite(b"\x03" * size, offset=0)
        volume.write_zeroes(offset=0, length=size)
        volume.flush()
        assert volume.store_bytes() == again
        assert read_snapshot(volume, epochs[0]) == before
        assert read_snapshot(volume, epochs[-1]) == before
        volume.close()


def test_a_block_is_kept_if_and_only_if_a_live_snapshot_selects_it():
    """S1 leaves out A, S2 leaves out B; outside of both, and where they overlap, all is written."""
    blocks = 1024
    a, b = range(100, 400), range(300, 600)
    both, only_a, only_b = range(300, 400), range(100, 300), range(400, 600)
    with scratch() as folder:
        before = random.Random(5).randbytes(blocks * BLOCK)
        volume = make_volume(folder, before)
        end = blocks * BLOCK
        s1 = take(volume, (0, a.start * BLOCK), (a.stop * BLOCK, end))
        s2 = take(volume, (0, b.start * BLOCK), (b.stop * BLOCK, end))
        empty = volume.store_bytes()

        def keeps(expected: int) -> None:
            grown = volume.store_bytes() - empty
            assert expected * BLOCK <= grown <= expected * (BLOCK + RECORD_BYTES_MAX) + 16 * BLOCK

        volume.pwrite(b"\x01" * (len(both) * BLOCK), offset=both.start * BLOCK)
        volume.flush()
        assert preserved(volume) == 0  # selected by neither
        assert volume.store_bytes() == empty

        volume.pwrite(b"\x02" * end, offset=0)
        volume.flush()
        assert preserved(volume) == blocks - len(both)
        keeps(blocks - len(both))

        info = {e.epoch: e for e in volume.epochs()}
        assert info[s1].exclusive_bytes == len(only_b) * BLOCK
        assert info[s2].exclusive_bytes == len(only_a) * BLOCK
        assert info[s1].preserved_bytes == (blocks - len(a)) * BLOCK

        allocated = log_allocated_bytes(folder)
        freed = volume.delete_snapshot(epoch=s1)
        assert freed == pytest.approx(len(only_b) * BLOCK, abs=32 * BLOCK)
        assert allocated - log_allocated_bytes(folder) == freed
        keeps(blocks - len(b))
        seen = bytearray(before)
        seen[b.start * BLOCK : b.stop * BLOCK] = bytes(len(b) * BLOCK)
        assert read_snapshot(volume, s2) == seen

        volume.close()
        volume = open_volume(folder)
        assert read_snapshot(volume, s2) == seen
        volume.delete_snapshot(epoch=s2)
        assert volume.store_bytes() == 0
        assert log_allocated_bytes(folder) <= 16 * BLOCK
        volume.close()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_deleting_in_any_order_frees_what_nobody_else_needs_and_in_the_end_all(order):
    blocks = 512
    with scratch() as folder:
        dice, contents, epochs = random.Random(6), [], []
        volume = make_volume(folder, dice.randbytes(blocks * BLOCK))
        for _ in range(4):
            contents.append(volume.pread(offset=0, length=blocks * BLOCK))
            epochs.append(take(volume))
            for block in dice.sample(range(blocks), 200):
                volume.pwrite(dice.randbytes(BLOCK), offset=block * BLOCK)
        volume.flush()
        left = dict(zip(epochs, contents, strict=True))
        for number in order:
            epoch = epochs[number]
            own = next(e.exclusive_bytes for e in volume.epochs() if e.epoch == epoch)
            before = volume.store_bytes()
            volume.delete_snapshot(epoch=epoch)
            del left[epoch]
            # Besides its own blocks only records go, whole segments of them.
            freed = before - volume.store_bytes()
            assert own - SEAL_BYTES_MAX <= freed <= own + 64 * BLOCK
            for other, content in left.items():
                assert read_snapshot(volume, other) == content
        assert volume.store_bytes() == 0
        volume.close()


def test_narrowing_gives_back_what_it_lets_go_of():
    blocks = 512
    with scratch() as folder:
        before = random.Random(7).randbytes(blocks * BLOCK)
        volume = make_volume(folder, before)
        epoch = take(volume)
        volume.pwrite(b"\x01" * (blocks * BLOCK), offset=0)
        kept = volume.store_bytes()
        freed = volume.inner.narrow(epoch=epoch, selection=[(0, 64 * BLOCK)], meta=b"")
        assert freed == pytest.approx((blocks - 64) * BLOCK, abs=8 * BLOCK)
        assert kept - volume.store_bytes() >= (blocks - 64) * BLOCK - SEAL_BYTES_MAX
        assert read_snapshot(volume, epoch) == before[: 64 * BLOCK] + bytes((blocks - 64) * BLOCK)
        volume.close()


@pytest.mark.parametrize("has_snapshot", [False, True])
def test_what_nobody_designated_costs_nothing(has_snapshot):
    blocks = 1024
    with scratch() as folder:
        volume = make_volume(folder, random.Random(8).randbytes(blocks * BLOCK))
        if has_snapshot:
            take(volume, (0, 16 * BLOCK))
        store, log = volume.store_bytes(), log_allocated_bytes(folder)
        dice = random.Random(9)
        for _ in range(500):
            offset = dice.randrange(16 * BLOCK, blocks * BLOCK - 40_000)
            volume.pwrite(dice.randbytes(dice.randrange(1, 40_000)), offset=offset)
        volume.write_zeroes(offset=16 * BLOCK, length=MIB)
        volume.trim(offset=2 * MIB, length=MIB)
        volume.flush()
        assert (volume.store_bytes(), log_allocated_bytes(folder)) == (store, log)
        counters = volume.statistics()
        assert counters["buffered_writes"] == counters["batches"] == preserved(volume) == 0
        volume.close()


def test_a_bookmark_costs_records_and_no_copies():
    blocks = 1024
    with scratch() as folder:
        volume = make_volume(folder, random.Random(10).randbytes(blocks * BLOCK))
        epoch = take(volume)
        volume.bookmark(epoch=epoch, meta=b"")
        volume.delete_snapshot(epoch=epoch)
        before = volume.store_bytes()
        volume.pwrite(b"\x01" * (blocks * BLOCK), offset=0)
        volume.flush()
        assert preserved(volume) == 0
        assert volume.store_bytes() - before <= blocks * RECORD_BYTES_MAX
        assert volume.changed(since=epoch) == ((0, blocks * BLOCK),)
        volume.delete_bookmark(epoch=epoch)
        assert volume.store_bytes() == 0
        volume.close()


@pytest.mark.parametrize("offset", [0, 1, 512, 4095])
def test_one_write_larger_than_the_buffer_passes_and_is_undone_by_the_snapshot(offset):
    """The smallest buffer has 1020 slots; an odd offset keeps most of this out of the fast path."""
    blocks = 3 * BATCH_BLOCKS
    with scratch() as folder:
        before = random.Random(11).randbytes(blocks * BLOCK)
        volume = make_volume(folder, before, buffer_bytes=MIB)
        epoch = take(volume)
        data = random.Random(12).randbytes(blocks * BLOCK - offset)
        volume.pwrite(data, offset=offset, fua=True)
        assert (folder / "disk.img").read_bytes() == before[:offset] + data
        assert preserved(volume) == blocks
        assert read_snapshot(volume, epoch) == before
        volume.close()


def test_scattered_writes_that_outrun_a_small_buffer_all_arrive():
    blocks = 4 * BATCH_BLOCKS
    with scratch() as folder:
        before = random.Random(13).randbytes(blocks * BLOCK)
        volume = make_volume(folder, before, buffer_bytes=MIB)
        epoch = take(volume)
        order = list(range(blocks))
        random.Random(14).shuffle(order)
        live = bytearray(before)
        for number, block in enumerate(order):
            data = number.to_bytes(4, "little") * 100
            volume.pwrite(data, offset=block * BLOCK + 100)
            live[block * BLOCK + 100 : block * BLOCK + 500] = data
        assert volume.pread(offset=0, length=blocks * BLOCK) == live
        assert preserved(volume) <= blocks
        assert read_snapshot(volume, epoch) == before
        volume.close()
        assert (folder / "disk.img").read_bytes() == live
