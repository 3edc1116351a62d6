"""What the engine promises, as a program of a few pages: a bytearray for every instant.

Blocks are counted, not optimised: which blocks changed in which epoch, which of them a live
snapshot still waits for. `must` is what a changed set has to hold, `may` what it is allowed to hold
beside that: blocks of a discard that the engine was free to ignore.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Blocks = set[int]


@dataclass(slots=True)
class Instant:
    """A snapshot, a bookmark, or both."""

    epoch: int
    content: bytes
    selection: Blocks | None
    baseline: Blocks | None = None

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def tracked(self) -> Blocks:
        return (self.selection or set()) | (self.baseline or set())


@dataclass(slots=True)
class Reference:
    """One volume."""

    block_size: int
    live: bytearray
    epoch: int = 0
    instants: dict[int, Instant] = field(default_factory=dict)
    must: dict[tuple[int, int], Blocks] = field(default_factory=dict)
    """By the first and the last epoch in which the change can have happened; mostly the same."""
    may: dict[int, Blocks] = field(default_factory=dict)
    pending: Blocks = field(default_factory=set)
    """Blocks whose next write preserves."""
    copies: int = 0
    """First changes of pending blocks so far: what the engine may preserve, and no more (P3)."""
    copies_unsure: int = 0
    """More that it may make at any time, where the model cannot tell whether it has."""

    @property
    def size(self) -> int:
        return len(self.live)

    @property
    def block_count(self) -> int:
        return -(-self.size // self.block_size)

    @property
    def snapshots(self) -> list[Instant]:
        return [i for i in self.instants.values() if i.selection is not None]

    def touched(self, start: int, end: int) -> Blocks:
        """Blocks with a byte of `[start, end)`."""
        if start >= end:
            return set()
        return set(range(start // self.block_size, -(-end // self.block_size)))

    def inside(self, start: int, end: int) -> Blocks:
        """Blocks that lie whole in `[start, end)`; the last one ends with the disk."""
        first = -(-start // self.block_size)
        last = self.block_count if end == self.size else end // self.block_size
        return set(range(first, last))

    def extents(self, blocks: Blocks, *, size: int | None = None) -> list[tuple[int, int]]:
        """Byte extents of blocks, joined and clipped."""
        found: list[tuple[int, int]] = []
        for block in sorted(blocks):
            start = block * self.block_size
            end = min(start + self.block_size, self.size if size is None else size)
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        return found

    def blocks_of(self, extents: list[tuple[int, int]] | tuple[tuple[int, int], ...]) -> Blocks:
        return set().union(*(self.touched(start, end) for start, end in extents))

    # What clients do

    def change(self, blocks: Blocks) -> None:
        self.must.setdefault((self.epoch, self.epoch), set()).update(blocks)
        self.copies += len(self.pending & blocks)
        self.pending -= blocks

    def write(self, offset: int, data: bytes) -> None:
        self.change(self.touched(offset, offset + len(data)))
        self.live[offset : offset + len(data)] = data

    def trimmed(self, offset: int, length: int, now: bytes) -> None:
        """The disk read `now` after a discard: a block is as before, or zeros and not pending."""
        end = offset + length
        whole = self.inside(offset, end)
        for block in self.touched(0, self.size):
            start = block * self.block_size
            stop = min(start + self.block_size, self.size)
            before, after = self.live[start:stop], now[start:stop]
            if before == after:
                continue
            assert block in whole, f"a discard of {offset}+{length} changed block {block}"
            assert not any(after), f"a discard left block {block} neither as it was nor zero"
            assert block not in self.pending, f"a discard changed block {block}, not preserved"
            self.change({block})
        self.may.setdefault(self.epoch, set()).update(whole - self.pending)
        self.live[:] = now

    # Instants

    def snapshot(self, epoch: int, selection: Blocks, content: bytes | None = None) -> Instant:
        content = bytes(self.live) if content is None else content
        instant = Instant(epoch=epoch, content=content, selection=set(selection))
        self.epoch = epoch
        self.instants[epoch] = instant
        self.pending |= selection
        return instant

    def restored(self, source: Instant, request: Blocks) -> tuple[Blocks, Blocks]:
        """Blocks that a restore would write now for certain, and those that it may write.

        The difference still is what it was at the instant, so that writing it changes nothing.
        """
        assert source.selection is not None
        wanted = source.selection & request
        return (
            self.must_between(source.epoch, None) & wanted,
            self.may_between(source.epoch, None) & wanted,
        )

    def restore(self, epoch: int, source: Instant, request: Blocks, safety: Blocks) -> None:
        assert source.selection is not None
        blocks, possible = self.restored(source, request)
        self.snapshot(epoch, safety | (source.selection & request))
        self.change(blocks)
        self.may.setdefault(epoch, set()).update(possible)
        self.copies_unsure += len(possible & self.pending)
        self.pending -= possible
        for start, end in self.extents(blocks, size=source.size):
            self.live[start:end] = source.content[start:end]

    def narrow(self, instant: Instant, selection: Blocks) -> None:
        assert instant.selection is not None
        instant.selection &= selection
        self._settle()

    def delete_snapshot(self, instant: Instant) -> None:
        instant.selection = None
        self._settle()

    def delete_bookmark(self, instant: Instant) -> None:
        instant.baseline = None
        self._settle()

    def _settle(self) -> None:
        for epoch, instant in list(self.instants.items()):
            if instant.selection is None and instant.baseline is None:
                del self.instants[epoch]
        waiting: Blocks = set()
        for instant in self.snapshots:
            assert instant.selection is not None
            waiting |= instant.selection - self.must_between(instant.epoch, None)
        self.pending &= waiting

    def instant_amid(
        self, epoch: int, selection: Blocks, seen: bytes, blocks: Blocks, after: bytes
    ) -> None:
        """Take over an instant that fell amid writes to `blocks`: what it holds tells where."""
        old, before = self.epoch, bytes(self.live)
        content, early, late = bytearray(before), set(), set()
        for start, end in self.extents(selection):
            content[start:end] = seen[start:end]
        for block in blocks:
            start, end = block * self.block_size, (block + 1) * self.block_size
            for at in range(start, min(end, len(content))):
                assert content[at] in (before[at], after[at]), f"byte {at} of the instant"
            if content[start:end] != before[start:end]:
                early.add(block)
            if block in selection and content[start:end] != after[start:end]:
                late.add(block)
        self.copies += len(blocks & self.pending)
        self.copies_unsure += len(blocks & selection)
        self.snapshot(epoch, selection, bytes(content))
        self.pending -= blocks
        for epochs, changed in (
            ((old, old), early),
            ((epoch, epoch), late),
            ((old, epoch), blocks),
        ):
            self.must.setdefault(epochs, set()).update(changed)
        for number in (old, epoch):
            self.may.setdefault(number, set()).update(blocks)
        self.live[:] = after

    # Changed sets

    def must_between(self, since: int, until: int | None) -> Blocks:
        changes = self.must.items()
        inside = (s for (a, b), s in changes if a >= since and (until is None or b < until))
        return set().union(*inside)

    def may_between(self, since: int, until: int | None) -> Blocks:
        maybe = (s for e, s in self.may.items() if e >= since and (until is None or e < until))
        return set().union(*maybe) | self.must_between(since, until)

    def changed(self, since: Instant, until: Instant | None) -> tuple[Blocks, Blocks]:
        """(what must be in the changed set, what may be)."""
        end = None if until is None else until.epoch
        size = self.size if until is None else until.size
        grown = self.touched(since.size, size) if size > since.size else set()
        tracked = since.tracked
        return (
            (self.must_between(since.epoch, end) & tracked) | grown,
            (self.may_between(since.epoch, end) & tracked) | grown,
        )

    def seen(self, instant: Instant) -> bytes:
        """What reading a snapshot gives: zeros for what it does not select."""
        assert instant.selection is not None
        found = bytearray(instant.size)
        for start, end in self.extents(instant.selection, size=instant.size):
            found[start:end] = instant.content[start:end]
        return bytes(found)
