"""What a large volume costs: time to open it, memory for a preserved block and for a bitmap, the
idle pause.

Made through the library rather than over NBD, so that a million blocks take seconds. Each state
is opened in a fresh process and its memory compared with that of the same volume when it was
empty; what is left is what the state costs.
"""

import array
import enum
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from bench.errors import UsageError
from bench.marks import Mark, mark_table, say
from bench.probe import run_probe
from bench.tables import as_text
from bench.units import BLOCK_BYTES, MIB, format_size

OPEN_S_MAX = 3.0
PAUSE_MS_MAX = 20.0
BYTES_PER_PRESERVED_BLOCK_MAX = 24.0
BITS_PER_BLOCK_MAX = 2
PLACE_SEED = 11
SCRATCH_SPARE_BYTES = 512 * MIB


class Placement(enum.Enum):
    """Where the preserved blocks lie."""

    SCATTERED = "scattered"
    """All over the volume: every part of the bitmaps is in use."""
    CLUSTERED = "clustered"
    """Side by side: the bitmaps stay small and the index shows alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The volume to make."""

    size_bytes: int
    preserved_count: int
    placement: Placement
    snapshot_count: int

    @property
    def block_count(self) -> int:
        return self.size_bytes // BLOCK_BYTES

    @property
    def bitmap_bytes(self) -> int:
        """What two bits a block come to."""
        return self.block_count * BITS_PER_BLOCK_MAX // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What the steps reported: bytes are growth of the process's proportional set size."""

    empty_bytes: float
    bits_bytes: float
    full_bytes: float
    kept_bytes: float
    cold_open_s: float
    warm_open_s: float
    pause_ms_max: float
    snapshot_ms_max: float


def offsets(plan: Plan) -> "array.array[int]":
    """Where the preserved blocks lie, in no order."""
    if plan.preserved_count < 1 or plan.preserved_count > plan.block_count:
        raise UsageError(f"--blocks must be between 1 and {plan.block_count}")
    if plan.placement is Placement.SCATTERED:
        chosen = random.Random(PLACE_SEED).sample(range(plan.block_count), plan.preserved_count)
    else:
        chosen = list(range(plan.preserved_count))
    return array.array("q", (block * BLOCK_BYTES for block in chosen))


def marks(plan: Plan, seen: Observed) -> list[Mark]:
    """The figures with their marks.

    Scattered blocks unfold all of the bitmaps, so the two bits a block are taken off before the
    rest is divided by the preserved blocks; clustered ones leave the bitmaps as the snapshot made
    them.
    """
    grown_bytes = seen.full_bytes - seen.empty_bytes
    is_scattered = plan.placement is Placement.SCATTERED
    base_bytes = plan.bitmap_bytes if is_scattered else seen.bits_bytes
    each_bytes = max(0.0, grown_bytes - base_bytes) / plan.preserved_count
    most_bytes = plan.bitmap_bytes + plan.preserved_count * BYTES_PER_PRESERVED_BLOCK_MAX
    return [
        Mark(what="open, nothing cached, s", figure=seen.cold_open_s, most=OPEN_S_MAX),
        Mark(what="open, store cached, s", figure=seen.warm_open_s, most=OPEN_S_MAX),
        Mark(
            what="memory of a snapshot of everything, MiB",
            figure=seen.bits_bytes / MIB,
            most=plan.bitmap_bytes / MIB,
        ),
        Mark(
            what="memory for snapshot and preserved blocks, MiB",
            figure=grown_bytes / MIB,
            most=most_bytes / MIB,
        ),
        Mark(
            what="memory per preserved block, bytes",
            figure=each_bytes,
            most=BYTES_PER_PRESERVED_BLOCK_MAX,
        ),
        Mark(
            what="store per preserved block, bytes",
            figure=seen.kept_bytes / plan.preserved_count,
            most=None,
        ),
        Mark(
            what="pause of an idle snapshot, longest, ms",
            figure=seen.pause_ms_max,
            most=PAUSE_MS_MAX,
        ),
        Mark(
            what="idle snapshot until durable, longest, ms", figure=seen.snapshot_ms_max, most=None
        ),
    ]


def measure(plan: Plan, *, parent: Path | None) -> bool:
    """Make the volume, measure, print the table; return whether every mark is kept."""
    places = offsets(plan)
    needed = 2 * plan.preserved_count * BLOCK_BYTES + SCRATCH_SPARE_BYTES
    with machine.scratch_directory(parent, needed_bytes=needed) as scratch:
        seen = _observe(plan, places, scratch)
    found = marks(plan, seen)
    print(as_text(mark_table(_title(plan), found)))
    return all(mark.is_kept for mark in found)


def _observe(plan: Plan, places: "array.array[int]", scratch: Path) -> Observed:
    origin, store, list_path = scratch / "origin.img", scratch / "store", scratch / "offsets"
    list_path.write_bytes(places.tobytes())
    say(f"writing {plan.preserved_count} blocks to a sparse origin")
    _write_originals(origin, places, size_bytes=plan.size_bytes)
    run_probe("create", store, str(origin))
    empty = run_probe("open", store)
    say("preserving them")
    preserved = run_probe("preserve", store, str(list_path))
    say("opening again")
    machine.evict_all(scratch)
    cold = run_probe("open", store)
    warm = run_probe("open", store)
    paused = run_probe("pause", store, str(plan.snapshot_count))
    return Observed(
        empty_bytes=empty["open_pss_bytes"],
        bits_bytes=preserved["bits_bytes"],
        full_bytes=max(cold["open_pss_bytes"], warm["open_pss_bytes"]),
        kept_bytes=preserved["kept_bytes"],
        cold_open_s=cold["open_s"],
        warm_open_s=warm["open_s"],
        pause_ms_max=paused["pause_ms_max"],
        snapshot_ms_max=paused["snapshot_ms_max"],
    )


def _write_originals(origin: Path, places: Sequence[int], *, size_bytes: int) -> None:
    # Not zeros: an original that is zero is kept as a note without content.
    data = random.Random(PLACE_SEED).randbytes(BLOCK_BYTES)
    with origin.open("wb", buffering=0) as file:
        file.truncate(size_bytes)
        for offset in sorted(places):
            os.pwrite(file.fileno(), data, offset)
        os.fdatasync(file.fileno())


def _title(plan: Plan) -> str:
    return (
        f"{format_size(plan.size_bytes)}, {plan.preserved_count:,} preserved blocks, "
        f"{plan.placement.value}"
    )
