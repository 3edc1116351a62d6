"""Rounds: A B C ... A B C ..., one server alive at a time: a slow minute hits all alike."""

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from bench import machine, registry
from bench.errors import BenchError
from bench.results import Session
from bench.session import Options, run_session
from bench.targets import Place, Role, Target
from bench.units import BLOCK_BYTES, MIB
from bench.workloads import Mode

Visit = Callable[[str, int], Session]


def interleave(
    names: Sequence[str], *, round_count: int, label: str, visit: Visit
) -> Iterator[Session]:
    """Visit every target once a round; say on stderr what is done."""
    for round_index in range(round_count):
        for name in names:
            session = visit(name, round_index)
            for row, reason in session.failures.items():
                print(f"# {name} {row}: {reason}", file=sys.stderr)
            clock = time.strftime("%H:%M:%S")
            print(
                f"# {label} round {round_index + 1}/{round_count} {name} done {clock}",
                file=sys.stderr,
                flush=True,
            )
            yield session


def visit_of(place: Place, rows_of: Callable[[Target], dict[str, dict[str, float]]]) -> Visit:
    """A visit that starts a server, measures its rows and stops it; what fails fails as a whole."""

    def visit(name: str, round_index: int) -> Session:
        target = registry.make(name, place=place)
        meter = machine.OthersMeter()
        rows: dict[str, dict[str, float]] = {}
        failures: dict[str, str] = {}
        try:
            target.start()
            rows = rows_of(target)
        except (BenchError, OSError) as error:
            failures = {"session": str(error)}
        finally:
            target.stop()
        return Session(
            target=name,
            round_index=round_index,
            rows=rows,
            failures=failures,
            figures={"others_cores": meter.cores()},
        )

    return visit


def measure_rows(
    names: Sequence[str], *, place: Place, mode: Mode, options: Options, round_count: int
) -> Iterator[Session]:
    """The rows of `io`, `sync` or `direct` on those targets that can run them."""

    def visit(name: str, round_index: int) -> Session:
        target = registry.make(name, place=place)
        return run_session(target, round_index=round_index, mode=mode, options=options)

    wanted = [name for name in names if _can_run(name, place=place, mode=mode)]
    yield from interleave(wanted, round_count=round_count, label=mode.value, visit=visit)


def _can_run(name: str, *, place: Place, mode: Mode) -> bool:
    parsed = registry.parse(name)
    if place.is_direct and not registry.SERVERS[parsed.server].can_direct:
        return False
    if mode is Mode.IO:
        return True
    if mode is Mode.DIRECT:
        return name in (registry.QSD_RAW, registry.OURS, registry.OURS_RAW)
    return parsed.role in (Role.RAW, Role.SNAPSHOT, Role.BOOKMARK)


# -- what a sync costs on the disk of `sync`

SYNC_SAMPLE_COUNT = 60
_LOG_BYTES = 64 * MIB


def sync_cost(place: Place) -> dict[str, float]:
    """Microseconds of an fdatasync of the origin and of a log, after 1 and after 32 blocks.

    Of the image after random 4 KiB writes; of a file written before after one append of as many
    blocks and a header of 4 KiB. `limit_N` is the share of the raw throughput that is left to a
    server which must do both.
    """
    log = place.scratch / "sync-log"
    machine.fill(log, _LOG_BYTES)
    data = random.Random(4).randbytes(33 * BLOCK_BYTES)
    choose = random.Random(5).randrange
    block_count = place.size_bytes // BLOCK_BYTES
    found: dict[str, float] = {}
    with (
        place.image.open("r+b", buffering=0) as origin_file,
        log.open("r+b", buffering=0) as log_file,
    ):
        origin, kept = origin_file.fileno(), log_file.fileno()
        for batch in (1, 32):
            origin_us, log_us = [], []
            position = 0
            for _ in range(SYNC_SAMPLE_COUNT):
                for _ in range(batch):
                    os.pwrite(origin, data[:BLOCK_BYTES], choose(block_count) * BLOCK_BYTES)
                origin_us.append(_sync_us(origin))
                if position + len(data) > _LOG_BYTES:
                    position = 0
                position += os.pwrite(kept, data[: (batch + 1) * BLOCK_BYTES], position)
                log_us.append(_sync_us(kept))
            x, y = statistics.median(origin_us), statistics.median(log_us)
            found |= {f"origin_us_{batch}": x, f"log_us_{batch}": y, f"limit_{batch}": x / (x + y)}
    log.unlink()
    return found


def _sync_us(descriptor: int) -> float:
    begin = time.perf_counter()
    os.fdatasync(descriptor)
    return (time.perf_counter() - begin) * 1e6


def mean_cost(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The cost of a sync from a measurement before and one after a run."""
    return {name: (before[name] + after[name]) / 2 for name in before}
