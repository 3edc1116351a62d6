"""What a store costs after years: time and memory to open it, with its index and without, and to
read a block of an old snapshot.

The store is made by a Rust example, which writes the log directly: through the engine fifty million
first changes would take hours. Every step runs in a process of its own; memory is the most that it
had resident, shared pages and all.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from bench import fields, machine
from bench.marks import Mark, mark_table, say
from bench.probe import REPOSITORY
from bench.process import run_tool
from bench.tables import as_text
from bench.units import GIB, MIB

STEP_TIMEOUT_S = 3600.0
OPEN_S_MAX = 10.0
PEAK_BYTES_MAX = 2.4e9
READ_COUNT = 20_000
STORE_BYTES_PER_ZERO_BLOCK = 48
"""Two descriptors of 16 bytes, and its entry in the index, which is there twice for a moment."""
STORE_BYTES_PER_PAYLOAD_BLOCK = 4096 + STORE_BYTES_PER_ZERO_BLOCK
STORE_BYTES_PER_EPOCH = 256 * 1024
"""Its headers, twice, and the heads of batches that are not full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The store to make: a live snapshot of 15 TiB an epoch, blocks scattered all over it."""

    epoch_count: int
    zero_count: int
    payload_count: int

    @property
    def store_bytes(self) -> int:
        return (
            self.zero_count * STORE_BYTES_PER_ZERO_BLOCK
            + self.payload_count * STORE_BYTES_PER_PAYLOAD_BLOCK
            + self.epoch_count * STORE_BYTES_PER_EPOCH
        )


def measure(plan: Plan, *, parent: Path | None) -> bool:
    """Make the store, measure, print the table; return whether every mark is kept."""
    program = _build()
    with machine.scratch_directory(parent, needed_bytes=plan.store_bytes + GIB) as scratch:
        volume = scratch / "volume"
        numbers = (plan.epoch_count, plan.zero_count, plan.payload_count)
        say(f"writing the log of {numbers[0]} epochs")
        _step(program, "make", volume, *numbers)
        say("opening it without an index, and making one")
        without = _step(program, "open", volume)
        _step(program, "index", volume)
        say("opening it with the index")
        machine.evict_all(volume)
        cold = _step(program, "open", volume)
        warm = _step(program, "open", volume)
        read = _step(program, "read", volume, READ_COUNT)
    marks = _marks(cold=cold, warm=warm, without=without, read=read)
    print(as_text(mark_table(_title(plan), marks)))
    return all(mark.is_kept for mark in marks)


def _build() -> Path:
    run_tool(
        ["cargo", "build", "--release", "--package", "stillblock-core", "--example", "scale_store"],
        timeout_s=STEP_TIMEOUT_S,
        directory=REPOSITORY,
    )
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
    return target / "release" / "examples" / "scale_store"


def _step(program: Path, step: str, volume: Path, *numbers: int) -> dict[str, float]:
    command = [str(program), step, str(volume), *(str(number) for number in numbers)]
    printed = run_tool(command, timeout_s=STEP_TIMEOUT_S)
    return fields.numbers(printed or "{}", "scale_store")


def _marks(
    *,
    cold: dict[str, float],
    warm: dict[str, float],
    without: dict[str, float],
    read: dict[str, float],
) -> list[Mark]:
    peak_bytes = max(cold["peak_bytes"], warm["peak_bytes"])
    return [
        Mark(what="open, nothing cached, s", figure=cold["open_s"], most=OPEN_S_MAX),
        Mark(what="open, store cached, s", figure=warm["open_s"], most=OPEN_S_MAX),
        Mark(
            what="memory at most, opened, MiB",
            figure=peak_bytes / MIB,
            most=PEAK_BYTES_MAX / MIB,
        ),
        Mark(what="records in the index, millions", figure=warm["entries"] / 1e6, most=None),
        Mark(what="open without any index, s", figure=without["open_s"], most=None),
        Mark(
            what="memory at most, opened without any index, MiB",
            figure=without["peak_bytes"] / MIB,
            most=PEAK_BYTES_MAX / MIB,
        ),
        Mark(
            what="read a block of any snapshot, median, us", figure=read["read_p50_us"], most=None
        ),
        Mark(what="the same, of a hundred the slowest, us", figure=read["read_p99_us"], most=None),
    ]


def _title(plan: Plan) -> str:
    return (
        f"15 TiB, {plan.epoch_count:,} live snapshots, {plan.zero_count:,} zero originals, "
        f"{plan.payload_count:,} with content"
    )
