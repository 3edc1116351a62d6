"""Races and borders of the engine that were wrong once, each as small as it can be shown."""

from __future__ import annotations

import itertools
import threading

import pytest

from model.volumes import PAUSE_LIMIT_MS, at_once, make_volume, read_snapshot, scratch, take
from stillblock import native
from stillblock.errors import ClosedError, ExcludedError, NotFoundError

BLOCK = 4096
KIB = 1024


# Cause: a view kept the selection of its opening, and a narrowing freed copies that it still looked
# up. Effect: blocks that were narrowed away read as on the live disk (P2). Fix: a view reads by the
# snapshot's present selection, and looks again after reading whether that is still the one.
def test_a_view_held_open_while_its_snapshot_is_narrowed_reads_zeros_there():
    with scratch() as folder:
        volume = make_volume(folder, b"\x11" * (8 * BLOCK))
        epoch = take(volume)
        volume.pwrite(b"\x22" * (8 * BLOCK), offset=0)
        view = volume.view(epoch=epoch)
        strict = volume.view(epoch=epoch, excluded_reads="error")
        volume.inner.narrow(epoch=epoch, selection=[(BLOCK, 8 * BLOCK)], meta=b"")

        assert view.pread(offset=0, length=8 * BLOCK) == bytes(BLOCK) + b"\x11" * (7 * BLOCK)
        assert view.extents(offset=0, length=2 * BLOCK) == [
            (0, BLOCK, native.HOLE | native.ZERO | native.NOT_SELECTED),
            (BLOCK, 2 * BLOCK, 0),
        ]
        with pytest.raises(ExcludedError, match="not in this snapshot's selection"):
            strict.pread(offset=0, length=BLOCK)
        assert strict.pread(offset=BLOCK, length=BLOCK) == b"\x11" * BLOCK
        volume.close()


# Cause: a view looked whether its snapshot was there before it read, not after. Effect: the later
# pieces of a long read under a forced deletion came from the live disk (P2). Fix: as above.
@pytest.mark.slow
def test_a_read_during_a_forced_deletion_gives_the_snapshot_or_an_error():
    with scratch() as folder:
        size = 4096 * BLOCK
        volume = make_volume(folder, bytes(size))
        for round_number in range(1, 16):
            then, now = bytes([round_number]) * size, b"\xff" * size
            volume.pwrite(then, offset=0)
            epoch = take(volume)
            volume.pwrite(now, offset=0)
            view = volume.view(epoch=epoch)
            begun = threading.Barrier(3, timeout=30)

            def read_until_gone(
                view: native.View = view, then: bytes = then, begun: threading.Barrier = begun
            ) -> None:
                for number in itertools.count():
                    try:
                        assert view.pread(offset=0, length=size) == then
                    except NotFoundError:
                        return
                    if number == 0:
                        begun.wait()

            def delete(epoch: int = epoch, begun: threading.Barrier = begun) -> None:
                begun.wait()
                volume.delete_snapshot(epoch=epoch, force=True)

            at_once(read_until_gone, read_until_gone, delete)
            view.close()
        volume.close()


# Cause: a write of parts of sectors read the rest of them, then took a slot, while a large write
# was between preserving and submitting. Effect: bytes of the large write, acknowledged and written
# by nobody else, fell back to what was there before. Fix: such a write holds the committer's role.
@pytest.mark.slow
def test_a_few_bytes_written_beside_a_large_write_undo_none_of_it(tmp_path):
    size = 512 * KIB
    # On the disk of the tests, not in memory: the window is as long as a sync takes.
    volume = make_volume(tmp_path, bytes(size))
    for round_number in range(1, 120):
        epoch = take(volume)
        fill = bytes([round_number % 200 + 1])
        offset = round_number * 7919 % (size - 16) | 1
        at_once(
            lambda fill=fill: volume.pwrite(fill * size, offset=0),
            lambda offset=offset: volume.pwrite(b"\xfb" * 10, offset=offset),
        )
        got = volume.pread(offset=0, length=size)
        assert set(got[:offset] + got[offset + 10 :]) == {fill[0]}
        assert set(got[offset : offset + 10]) <= {fill[0], 0xFB}
        volume.delete_snapshot(epoch=epoch)
    volume.close()


# Cause: a slot of the last block ends with the disk, and was brought home after the disk had grown.
# Effect: zeros over what the origin held behind its old end, within one sector (P1). Fix: growing
# waits until the last block has no slot.
@pytest.mark.parametrize("tail", [3, 511, 512, 1000, 4095])
def test_growth_behind_a_buffered_tail_keeps_what_it_brought(tail):
    with scratch() as folder:
        end = 4 * BLOCK + tail
        volume = make_volume(folder, b"\x11" * end)
        epoch = take(volume)
        volume.pwrite(b"\x22" * tail, offset=4 * BLOCK)
        with (folder / "disk.img").open("ab") as origin:
            origin.write(b"\x33" * 10_000)

        assert volume.resize() == end + 10_000
        expected = b"\x22" * tail + b"\x33" * 10_000
        assert volume.pread(offset=4 * BLOCK, length=tail + 10_000) == expected
        volume.flush()
        assert volume.pread(offset=4 * BLOCK, length=tail + 10_000) == expected
        assert read_snapshot(volume, epoch) == b"\x11" * end
        volume.close()


def test_an_instant_falls_between_writes_and_never_into_one_request_of_a_block():
    """Eight writers stamp blocks with their count; each snapshot holds whole stamps only."""
    blocks, rounds = 64, 30
    with scratch() as folder:
        volume = make_volume(folder, bytes(blocks * BLOCK))
        stop = threading.Event()
        done = [0] * 8

        def stamp(writer: int) -> None:
            for count in itertools.count(1):
                if stop.is_set():
                    return
                for block in range(writer, blocks, 8):
                    volume.pwrite(count.to_bytes(8, "little") * (BLOCK // 8), offset=block * BLOCK)
                done[writer] = count

        def snapshots() -> None:
            try:
                for _ in range(rounds):
                    before = list(done)
                    epoch = volume.snapshot(
                        selection=((0, blocks * BLOCK),), meta=b"", pause_limit_ms=PAUSE_LIMIT_MS
                    ).epoch
                    after = list(done)
                    first = read_snapshot(volume, epoch)
                    for block in range(blocks):
                        words = {
                            first[at : at + 8]
                            for at in range(block * BLOCK, (block + 1) * BLOCK, 8)
                        }
                        assert len(words) == 1
                        count = int.from_bytes(words.pop(), "little")
                        assert before[block % 8] <= count <= after[block % 8] + 1
                    assert read_snapshot(volume, epoch) == first
                    volume.delete_snapshot(epoch=epoch)
            finally:
                stop.set()

        at_once(snapshots, *(lambda writer=writer: stamp(writer) for writer in range(8)))
        assert volume.store_bytes() == 0
        volume.close()


# Cause: a view kept reading the origin after its volume was closed or abandoned. Effect: what
# others wrote to the origin since showed up in the snapshot (P2). Fix: a view of a released volume
# fails.
@pytest.mark.parametrize("is_clean", [True, False])
def test_a_view_that_outlives_its_volume_gives_errors_and_never_other_bytes(is_clean):
    with scratch() as folder:
        volume = make_volume(folder, b"\x11" * (4 * BLOCK))
        view = volume.view(epoch=take(volume))
        if is_clean:
            volume.close()
        del volume
        (folder / "disk.img").write_bytes(b"\x99" * (4 * BLOCK))
        with pytest.raises(ClosedError):
            view.pread(offset=0, length=BLOCK)
        view.close()


# Cause: a changed set took the records first and the buffer after. Effect: a change that was being
# committed was in neither, so an increment would have missed it (P5). Fix: the buffer first.
def test_a_change_is_in_the_changed_set_at_every_moment_after_it_was_acknowledged():
    blocks, rounds = 256, 40
    with scratch() as folder:
        volume = make_volume(folder, bytes(blocks * BLOCK))
        for round_number in range(rounds):
            epoch = take(volume)
            written = range(round_number % 5, blocks, 3)
            for block in written:
                volume.pwrite(b"\x77" * BLOCK, offset=block * BLOCK)
            is_flushed = threading.Event()

            def flush(is_flushed: threading.Event = is_flushed) -> None:
                volume.flush()
                is_flushed.set()

            def look(
                is_flushed: threading.Event = is_flushed,
                epoch: int = epoch,
                written: range = written,
            ) -> None:
                while True:
                    is_last = is_flushed.is_set()
                    extents = volume.changed(since=epoch)
                    found = {b // BLOCK for s, e in extents for b in range(s, e, BLOCK)}
                    assert found == set(written)
                    if is_last:
                        return

            at_once(look, look, flush)
            volume.delete_snapshot(epoch=epoch)
        volume.close()


# Cause: block status of a snapshot looked for records first and at the origin after. Effect: a
# block that was zeroed in between was told to be a hole of the snapshot, and a copy skips holes
# (P2). Fix: the origin first.
def test_zeroing_the_disk_makes_no_holes_in_a_snapshot():
    blocks, rounds = 512, 12
    with scratch() as folder:
        volume = make_volume(folder, bytes(blocks * BLOCK))
        for _ in range(rounds):
            for block in range(0, blocks, 2):
                volume.pwrite(b"\x55" * BLOCK, offset=block * BLOCK)
            volume.flush()
            epoch = take(volume)
            view = volume.view(epoch=epoch)
            is_zeroed = threading.Event()

            def zero(is_zeroed: threading.Event = is_zeroed) -> None:
                for block in range(0, blocks, 2):
                    volume.write_zeroes(offset=block * BLOCK, length=BLOCK)
                is_zeroed.set()

            def look(view: native.View = view, is_zeroed: threading.Event = is_zeroed) -> None:
                while True:
                    is_last = is_zeroed.is_set()
                    extents = view.extents(offset=0, length=blocks * BLOCK)
                    for start, end, flags in extents:
                        has_data = end - start > BLOCK or start // BLOCK % 2 == 0
                        assert not (has_data and flags), f"a hole where data was: {start}-{end}"
                    if is_last:
                        return

            at_once(look, zero)
            view.close()
            volume.delete_snapshot(epoch=epoch)
        volume.close()
