"""The engine against a bytearray per instant: any request, any order, restarts, kills, growth.

The kill here is a volume that is dropped without being closed, with acknowledged writes in its
buffer; tests/faults kills the real process.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from model.reference import Blocks, Instant, Reference
from model.volumes import MEMORY, PAUSE_LIMIT_MS, at_once
from stillblock import native
from stillblock.errors import (
    ClosedError,
    ExcludedError,
    InUseError,
    NotFoundError,
    RestoreRunningError,
)

KIB = 1024
SECTOR = 512
SNAPSHOTS_MAX = 6
RESTORE_WAIT_MS = 20_000

position = st.floats(0, 1, exclude_max=True)
"""Where, as a share of the disk: sizes are known only as it runs."""
seed = st.integers(0, 2**32 - 1)
alignment = st.sampled_from([1, SECTOR, 4 * KIB, 16 * KIB, 256 * KIB])
length = st.one_of(
    st.integers(1, 20 * KIB),
    st.sampled_from([1, SECTOR, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 512 * KIB, 2048 * KIB]),
)
index = st.integers(0, 1000)
"""Which of those there are, modulo their number."""
choice = st.tuples(seed, st.sampled_from(["all", "half", "runs", "one", "none"]))


def content_of(number: int, size: int) -> bytes:
    """Random bytes, or one byte throughout, zeros now and then: what engines look for."""
    kind = number % 8
    if kind == 0:
        return bytes(size)
    if kind == 1:
        return bytes([number % 255 + 1]) * size
    return random.Random(number).randbytes(size)


class EngineMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="stillblock-model-", dir=MEMORY))
        self.views: list[tuple[native.View, int, str]] = []
        self.stale: list[native.View] = []
        self.volume: native.Volume = None  # type: ignore[assignment]
        self.reference: Reference = None  # type: ignore[assignment]
        self.copies_before = 0
        self.copies_flushed = 0

    @initialize(
        block_size=st.sampled_from([4096, 16384]),
        block_count=st.sampled_from([64, 97, 300]),
        tail=st.sampled_from([0, 0, SECTOR, 1536, 3, 4000]),
        fill=seed,
        options=st.sampled_from(["writeback", "writeback", "writethrough"]),
    )
    def make(
        self, block_size: int, block_count: int, tail: int, fill: int, options: native.Cache
    ) -> None:
        content = content_of(fill, block_count * block_size + tail)
        origin = self.folder / "disk.img"
        origin.write_bytes(content)
        native.create_volume(
            store=self.folder / "store", origin=origin, block_size=block_size, meta=b"m"
        )
        self.cache = options
        self.reference = Reference(block_size=block_size, live=bytearray(content))
        self.open()

    def open(self, recover: native.Recovery = "refuse") -> None:
        self.volume = native.Volume.open(
            self.folder / "store", cache=self.cache, buffer_dir=self.folder, recover=recover
        )
        self.copies_before = self.copies_flushed

    def teardown(self) -> None:
        try:
            for view, _, _ in self.views:
                view.close()
            if self.volume is not None:
                self.volume.close()
                assert (self.folder / "disk.img").read_bytes() == self.reference.live
            # What Hypothesis keeps of a machine must not keep its buffers in memory.
            self.views, self.volume = [], None  # type: ignore[assignment]
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    # Ranges

    def place(self, where: float, size: int, align: int) -> tuple[int, int]:
        """An offset and a length inside the disk."""
        offset = int(where * self.reference.size) // align * align
        return offset, min(size, self.reference.size - offset)

    def choose(self, chosen: tuple[int, str]) -> Blocks:
        """Some blocks of the disk."""
        number, kind = chosen
        count, dice = self.reference.block_count, random.Random(number)
        match kind:
            case "all":
                return set(range(count))
            case "half":
                return {block for block in range(count) if dice.random() < 0.5}
            case "runs":
                runs = [dice.randrange(count) for _ in range(3)]
                return {b for start in runs for b in range(start, min(count, start + 9))}
            case "one":
                return {dice.randrange(count)}
            case _:
                return set()

    def pick(self, number: int) -> Instant:
        found = self.reference.snapshots
        return found[number % len(found)]

    def has_snapshots(self) -> bool:
        return bool(self.reference is not None and self.reference.snapshots)

    def has_room(self) -> bool:
        return self.reference is not None and len(self.reference.snapshots) < SNAPSHOTS_MAX

    # Requests

    @rule(where=position, size=length, align=alignment, number=seed, fua=st.booleans())
    def write(self, where: float, size: int, align: int, number: int, fua: bool) -> None:
        offset, size = self.place(where, size, align)
        data = content_of(number, size)
        self.volume.pwrite(data, offset=offset, fua=fua)
        self.reference.write(offset, data)

    @rule(where=position, number=seed, count=st.integers(2, 12))
    def write_one_place_again_and_again(self, where: float, number: int, count: int) -> None:
        offset, size = self.place(where, 9000, 1)
        for turn in range(count):
            data = content_of(number + turn, size)
            self.volume.pwrite(data, offset=offset)
            self.reference.write(offset, data)

    @rule(where=position, size=length, align=alignment, punch=st.booleans(), fua=st.booleans())
    def zero(self, where: float, size: int, align: int, punch: bool, fua: bool) -> None:
        offset, size = self.place(where, size, align)
        self.volume.write_zeroes(offset=offset, length=size, may_punch=punch, fua=fua)
        self.reference.write(offset, bytes(size))

    @rule(where=position, size=length, align=alignment)
    def trim(self, where: float, size: int, align: int) -> None:
        offset, size = self.place(where, size, align)
        self.volume.trim(offset=offset, length=size)
        now = self.volume.pread(offset=0, length=self.reference.size)
        self.reference.trimmed(offset, size, now)

    @rule()
    def flush(self) -> None:
        self.volume.flush()
        self.note_flushed()

    def note_flushed(self) -> None:
        """All copies so far are made, unless a restore still owes some."""
        if self.volume.restore_status() is None:
            self.copies_flushed = self.reference.copies

    @rule(where=position, size=length)
    def read(self, where: float, size: int) -> None:
        offset, size = self.place(where, size, 1)
        got = self.volume.pread(offset=offset, length=size)
        assert got == self.reference.live[offset : offset + size]

    # Instants

    @precondition(has_room)
    @rule(chosen=choice, meta=st.binary(max_size=40))
    def snapshot(self, chosen: tuple[int, str], meta: bytes) -> None:
        selection = self.choose(chosen)
        instant = self.volume.snapshot(
            selection=tuple(self.reference.extents(selection)),
            meta=meta,
            pause_limit_ms=PAUSE_LIMIT_MS,
        )
        assert instant.epoch > self.reference.epoch
        assert instant.size_bytes == self.reference.size
        self.reference.snapshot(instant.epoch, selection)
        info = next(e for e in self.volume.epochs() if e.epoch == instant.epoch)
        assert info.meta == meta
        self.note_flushed()

    def let_restore_end(self) -> None:
        """What takes part in a restore is neither deleted nor narrowed."""
        status = self.volume.restore_status()
        if status is None:
            return
        try:
            self.volume.delete_snapshot(epoch=status.source_epoch, force=True)
        except RestoreRunningError:
            pass
        else:
            raise AssertionError("the source of a running restore was deleted")
        assert self.volume.restore_wait(timeout_ms=RESTORE_WAIT_MS)

    @precondition(has_snapshots)
    @rule(number=index, force=st.booleans())
    def delete(self, number: int, force: bool) -> None:
        instant = self.pick(number)
        self.let_restore_end()
        is_read = any(epoch == instant.epoch for _, epoch, _ in self.views)
        try:
            self.volume.delete_snapshot(epoch=instant.epoch, force=force)
        except InUseError:
            assert is_read
            assert not force
            return
        assert force or not is_read
        for view, epoch, _ in self.views:
            if epoch == instant.epoch:
                with pytest.raises(NotFoundError):
                    view.pread(offset=0, length=1)
                view.close()
        self.views = [v for v in self.views if v[1] != instant.epoch]
        self.reference.delete_snapshot(instant)

    @precondition(has_snapshots)
    @rule(number=index, chosen=choice)
    def narrow(self, number: int, chosen: tuple[int, str]) -> None:
        instant, selection = self.pick(number), self.choose(chosen)
        self.let_restore_end()
        extents = self.reference.extents(selection)
        self.volume.inner.narrow(epoch=instant.epoch, selection=extents, meta=b"narrowed")
        self.reference.narrow(instant, selection)

    @precondition(has_snapshots)
    @rule(number=index)
    def bookmark(self, number: int) -> None:
        instant = self.pick(number)
        self.volume.bookmark(epoch=instant.epoch, meta=b"b")
        assert instant.selection is not None
        instant.baseline = set(instant.selection)

    @precondition(
        lambda self: self.reference and any(i.baseline is not None for i in self.instants())
    )
    @rule(number=index)
    def delete_bookmark(self, number: int) -> None:
        marked = [i for i in self.instants() if i.baseline is not None]
        instant = marked[number % len(marked)]
        self.volume.delete_bookmark(epoch=instant.epoch)
        self.reference.delete_bookmark(instant)

    def instants(self) -> list[Instant]:
        return list(self.reference.instants.values())

    # Views that stay open

    @precondition(lambda self: self.has_snapshots() and len(self.views) < 4)
    @rule(number=index, excluded=st.sampled_from(["zeros", "error"]))
    def open_view(self, number: int, excluded: native.ExcludedReads) -> None:
        epoch = self.pick(number).epoch
        view = self.volume.view(epoch=epoch, excluded_reads=excluded)
        self.views.append((view, epoch, excluded))

    @precondition(lambda self: self.views)
    @rule(number=index)
    def close_view(self, number: int) -> None:
        view, _, _ = self.views.pop(number % len(self.views))
        view.close()
        with pytest.raises(ClosedError):
            view.pread(offset=0, length=1)

    @precondition(lambda self: self.views)
    @rule(number=index, where=position, size=length)
    def read_view(self, number: int, where: float, size: int) -> None:
        view, epoch, excluded = self.views[number % len(self.views)]
        instant = self.reference.instants[epoch]
        assert instant.selection is not None
        assert view.size_bytes == instant.size
        offset = int(where * instant.size)
        size = min(size, instant.size - offset)
        is_whole = self.reference.touched(offset, offset + size) <= instant.selection
        if excluded == "error" and not is_whole:
            with pytest.raises(ExcludedError):
                view.pread(offset=offset, length=size)
            return
        seen = self.reference.seen(instant)
        assert view.pread(offset=offset, length=size) == seen[offset : offset + size]

    # Restores

    @precondition(lambda self: self.has_snapshots() and self.has_room())
    @rule(number=index, request=choice, safety=choice, waits=st.booleans())
    def restore(
        self, number: int, request: tuple[int, str], safety: tuple[int, str], waits: bool
    ) -> None:
        source, blocks, kept = self.pick(number), self.choose(request), self.choose(safety)
        assert source.selection is not None
        certain, possible = self.reference.restored(source, blocks)
        plan = self.reference.blocks_of(
            self.volume.restore_plan(
                epoch=source.epoch, request=tuple(self.reference.extents(blocks))
            )
        )
        tail = self.reference.touched(source.size, source.size + 1)
        assert certain <= plan <= possible | (tail & source.selection)
        status = self.volume.restore(
            epoch=source.epoch,
            request=tuple(self.reference.extents(blocks)),
            safety_selection=tuple(self.reference.extents(kept)),
            meta=b"safety",
            pause_limit_ms=PAUSE_LIMIT_MS,
        )
        assert status.source_epoch == source.epoch
        self.reference.restore(status.safety_epoch, source, blocks, kept)
        if waits:
            assert self.volume.restore_wait(timeout_ms=RESTORE_WAIT_MS)
            assert self.volume.restore_status() is None

    # Restarts and growth

    def let_views_go(self) -> None:
        for view, epoch, _ in self.views:
            with pytest.raises((ClosedError, NotFoundError)):
                view.pread(offset=0, length=1)
            assert epoch in self.reference.instants
            view.close()
        self.views.clear()

    @rule(cache=st.sampled_from(["writeback", "writethrough"]))
    def restart(self, cache: native.Cache) -> None:
        is_restoring = self.volume.restore_status() is not None
        self.volume.close()
        if not is_restoring:
            assert (self.folder / "disk.img").read_bytes() == self.reference.live
            self.copies_flushed = self.reference.copies
        self.let_views_go()
        self.cache = cache
        self.open()

    @rule(cache=st.sampled_from(["writeback", "writethrough"]))
    def kill(self, cache: native.Cache) -> None:
        self.volume = None  # type: ignore[assignment] # abandoned: what was acknowledged stays
        self.let_views_go()
        self.cache = cache
        self.open()

    @rule(size=st.sampled_from([1, 100, SECTOR, 5000, 70_000]), number=seed)
    def grow(self, size: int, number: int) -> None:
        if self.reference.size > 6 << 20:
            return
        more = content_of(number, size)
        with (self.folder / "disk.img").open("ab") as origin:
            origin.write(more)
        self.reference.live += more
        assert self.volume.resize() == self.reference.size

    # Several at once

    @rule(
        number=seed,
        writers=st.integers(2, 4),
        align=st.sampled_from([1, SECTOR, 4096]),
        chosen=st.none() | choice,
        goes=index,
    )
    def together(
        self, number: int, writers: int, align: int, chosen: tuple[int, str] | None, goes: int
    ) -> None:
        """Writers in neighbouring ranges, readers, and perhaps an instant in their midst."""
        dice, before = random.Random(number), bytes(self.reference.live)
        ranges = self._ranges(dice, writers, align)
        writes = [(start, content_of(dice.getrandbits(32), end - start)) for start, end in ranges]
        after = bytearray(before)
        for start, data in writes:
            after[start : start + len(data)] = data
        calls: list[Callable[[], None]] = [
            partial(self.volume.pwrite, data, offset=start) for start, data in writes
        ]
        calls.append(lambda: self._read_either(before, bytes(after)))
        if self.reference.snapshots:
            instant = self.pick(goes)
            calls.append(lambda: self._read_exactly(instant))
        taken: list[int] = []
        selection: Blocks = set() if chosen is None else self.choose(chosen)
        if chosen is not None and self.has_room():
            calls.append(lambda: taken.append(self._take(selection)))
        at_once(*calls)
        blocks = self.reference.blocks_of(ranges)
        if not taken:
            for start, data in writes:
                self.reference.write(start, data)
            return
        view = self.volume.view(epoch=taken[0])
        seen = view.pread(offset=0, length=view.size_bytes)
        view.close()
        self.reference.instant_amid(taken[0], selection, seen, blocks, bytes(after))

    def _ranges(self, dice: random.Random, count: int, align: int) -> list[tuple[int, int]]:
        start = dice.randrange(self.reference.size) // align * align
        ranges = []
        for _ in range(count):
            size = dice.choice([align, 10, 700, 4096, 20_000, 256 * KIB, 300 * KIB])
            end = min(start + -(-size // align) * align, self.reference.size)
            if start < end:
                ranges.append((start, end))
            start = end
        return ranges

    def _take(self, selection: Blocks) -> int:
        return self.volume.snapshot(
            selection=tuple(self.reference.extents(selection)),
            meta=b"",
            pause_limit_ms=PAUSE_LIMIT_MS,
        ).epoch

    def _read_either(self, before: bytes, after: bytes) -> None:
        got = self.volume.pread(offset=0, length=len(before))
        for start in range(0, len(got), SECTOR):
            end = start + SECTOR
            if got[start:end] not in (before[start:end], after[start:end]):
                for at in range(start, min(end, len(got))):
                    assert got[at] in (before[at], after[at]), f"byte {at} was never written"

    def _read_exactly(self, instant: Instant) -> None:
        view = self.volume.view(epoch=instant.epoch)
        got = view.pread(offset=0, length=instant.size)
        view.close()
        assert got == self.reference.seen(instant)

    # What always holds

    @invariant()
    def live_is_what_was_written(self) -> None:
        if self.volume is not None:
            assert self.volume.size_bytes == self.reference.size
            assert self.volume.pread(offset=0, length=self.reference.size) == self.reference.live

    @invariant()
    def every_snapshot_is_its_instant(self) -> None:
        if self.volume is None:
            return
        reference = self.reference
        infos = {info.epoch: info for info in self.volume.epochs()}
        assert set(infos) == set(reference.instants)
        for instant in reference.snapshots:
            assert instant.selection is not None
            view = self.volume.view(epoch=instant.epoch)
            seen = view.pread(offset=0, length=instant.size)
            assert seen == reference.seen(instant)
            self._check_extents(view.extents(offset=0, length=instant.size), instant, seen)
            view.close()
            info = infos[instant.epoch]
            assert not info.is_suspect
            assert info.lost == []
            assert info.size_bytes == instant.size
            selected = self.volume.selection(epoch=instant.epoch)
            assert list(selected) == reference.extents(instant.selection, size=instant.size)
            assert info.exclusive_bytes <= info.preserved_bytes

    def _check_extents(
        self, extents: list[tuple[int, int, int]], instant: Instant, seen: bytes
    ) -> None:
        selected: Blocks = set()
        at = 0
        for start, end, flags in extents:
            assert start == at < end
            at = end
            if flags & (native.ZERO | native.HOLE):
                assert not any(seen[start:end])
            if not flags & native.NOT_SELECTED:
                selected |= self.reference.touched(start, end)
        assert at == instant.size
        assert selected == instant.selection

    @invariant()
    def changed_sets_are_exact(self) -> None:
        if self.volume is None:
            return
        instants = self.instants()
        for since in instants:
            laters = [i for i in instants if i.epoch >= since.epoch and i.selection is not None]
            for until in [None, *laters]:
                extents = self.volume.changed(
                    since=since.epoch, until=None if until is None else until.epoch
                )
                got = self.reference.blocks_of(extents)
                must, may = self.reference.changed(since, until)
                assert must <= got, f"missed: {sorted(must - got)}"
                assert got <= may, f"never written: {sorted(got - may)}"

    @invariant()
    def a_first_change_is_preserved_once_and_nothing_is_kept_for_nobody(self) -> None:
        if self.volume is None:
            return
        counters = self.volume.statistics()
        copies = self.reference.copies - self.copies_before
        assert counters["preserved_blocks"] <= copies + self.reference.copies_unsure
        if not self.reference.instants:
            assert self.volume.store_bytes() == 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_engine_keeps_its_promises_whatever_is_asked_of_it():
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            # 200 examples in CI: some 5000 steps. Deep runs take longer walks, for an hour or so.
            max_examples=min(settings.default.max_examples, 2000),
            stateful_step_count=25 if settings.default.max_examples <= 200 else 60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
