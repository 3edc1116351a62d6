"""What clones cost: making and opening many, what they take until written, reads through one.

In this process, past NBD: a difference in reading is not hidden behind sockets. Reads go through
the snapshot and the clone in turn, pass by pass, and the best pass of each counts.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import stillblock
from bench import machine
from bench.marks import Mark, mark_table, say
from bench.tables import as_text
from bench.units import BLOCK_BYTES, GIB, KIB, MIB
from stillblock.config import Config
from stillblock.model import RuleTerm
from stillblock.operations import clones, snapshots
from stillblock.operations.volume import OpenVolume

SIZE_BYTES = 256 * MIB
OPEN_MS_MAX = 10.0
STORED_KIB_MAX = 32.0
READ_RATIO_MAX = 1 / 0.9
"""A read through a clone takes at most so many times what one of its snapshot takes."""
SMALL_READS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many clones, and how many passes of reads."""

    clone_count: int
    round_count: int


Pread = Callable[[int, int], bytes]


def measure(plan: Plan, *, parent: Path | None) -> bool:
    """Print a table; return whether every mark is kept."""
    with machine.scratch_directory(parent, needed_bytes=GIB) as scratch:
        origin, state = scratch / "disk.img", scratch / "state"
        origin.write_bytes(random.Random(1).randbytes(MIB) * (SIZE_BYTES // MIB))
        stillblock.create("web", origin=origin, state_dir=state)
        marks = [*_many(plan, state), *_reads(plan, state)]
    title = f"{plan.clone_count} clones of a snapshot of {SIZE_BYTES // MIB} MiB"
    print(as_text(mark_table(title, marks)))
    return all(mark.is_kept for mark in marks)


def _many(plan: Plan, state: Path) -> list[Mark]:
    say(f"making {plan.clone_count} clones")
    make_ms, open_ms = [], []
    with OpenVolume.open(Config.load(state_dir=state), "web") as volume:
        everything = (RuleTerm(include=True, text="all"),)
        asked = snapshots.SnapshotRequest(name="monday", terms=everything, only_these=True)
        snapshots.create_snapshot(volume, asked)
        # Half of it is read from the log from here on, half from the origin.
        for offset in range(0, SIZE_BYTES, 2 * MIB):
            volume.engine.pwrite(bytes([offset // MIB % 251]) * MIB, offset=offset)
        volume.engine.flush()
        for number in range(plan.clone_count):
            began = time.perf_counter()
            request = clones.CloneRequest(snapshot="monday", name=f"clone-{number}")
            clones.create_clone(volume, request)
            make_ms.append((time.perf_counter() - began) * 1000)
        stored = clones.list_clones(volume).stored_bytes / plan.clone_count
    say("opening them")
    with OpenVolume.open(Config.load(state_dir=state), "web") as volume:
        engine = volume.engine
        for entry in engine.clones():
            began = time.perf_counter()
            engine.open_clone(number=entry.number)
            open_ms.append((time.perf_counter() - began) * 1000)
    return [
        Mark(what="make one, median, ms", figure=statistics.median(make_ms), most=None),
        Mark(what="open one, median, ms", figure=statistics.median(open_ms), most=OPEN_MS_MAX),
        Mark(what="stored until written, KiB each", figure=stored / KIB, most=STORED_KIB_MAX),
    ]


def _reads(plan: Plan, state: Path) -> list[Mark]:
    say("reading through a snapshot and a clone of it")
    with OpenVolume.open(Config.load(state_dir=state), "web") as volume:
        engine = volume.engine
        view = engine.view(epoch=volume.snapshot("monday").epoch.epoch)
        clone = engine.open_clone(number=engine.clones()[0].number)
        # As after some use: here and there a block is its own.
        for offset in range(0, SIZE_BYTES, 16 * MIB):
            clone.pwrite(b"x" * BLOCK_BYTES, offset=offset)
        readers: tuple[Pread, Pread] = (
            lambda offset, length: view.pread(offset=offset, length=length),
            lambda offset, length: clone.pread(offset=offset, length=length),
        )
        marks = []
        for what, offsets, length in (
            ("1 MiB in order", list(range(0, SIZE_BYTES, MIB)), MIB),
            ("4 KiB at random", _scattered(), BLOCK_BYTES),
        ):
            best = [float("inf"), float("inf")]
            for _ in range(plan.round_count):
                for which, pread in enumerate(readers):
                    best[which] = min(best[which], _pass(pread, offsets, length))
            rate = len(offsets) * length / MIB / best[0]
            marks.append(Mark(what=f"snapshot, {what}, MiB/s", figure=rate, most=None))
            ratio = best[1] / best[0]
            marks.append(Mark(what=f"clone, {what}, times", figure=ratio, most=READ_RATIO_MAX))
        view.close()
    return marks


def _scattered() -> list[int]:
    dice = random.Random(2)
    return [dice.randrange(SIZE_BYTES // BLOCK_BYTES) * BLOCK_BYTES for _ in range(SMALL_READS)]


def _pass(pread: Pread, offsets: list[int], length: int) -> float:
    began = time.perf_counter()
    for offset in offsets:
        pread(offset, length)
    return time.perf_counter() - began
