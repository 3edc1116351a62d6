"""What clients see of snapshots: the longest write of four connections of fio around each."""

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import fio
from bench.errors import PeerError
from bench.estimate import rank
from bench.instants import (
    AFTER_SNAPSHOT_S,
    WRITER_LEAD_S,
    WRITER_REGION_BYTES,
    Window,
    quiet_before,
    snapshot_every_second,
)
from bench.targets import Target
from bench.units import BLOCK_BYTES

CONNECTIONS = 4
DEPTH = 4
REQUESTS_PER_S = 1000
"""By each connection: steady, and below what any target can do, so that nobody queues."""


@dataclass(frozen=True, slots=True)
class Write:
    """A request from its being sent to its reply, in Unix time."""

    sent_s: float
    replied_s: float


def watch_writes(target: Target, snapshot_count: int) -> dict[str, float]:
    """The longest of the writes under way around each snapshot."""
    with tempfile.TemporaryDirectory(dir=target.place.scratch, prefix="latencies-") as folder:
        running = fio.start(
            fio.Job(
                uri=target.uri,
                pattern="randwrite",
                request_bytes=BLOCK_BYTES,
                depth=DEPTH,
                offset=0,
                length=WRITER_REGION_BYTES,
                runtime_s=snapshot_count + 3 * WRITER_LEAD_S,
                connection_count=CONNECTIONS,
                requests_per_s=REQUESTS_PER_S,
                latency_log=Path(folder) / "fio",
            )
        )
        try:
            windows = snapshot_every_second(target, running, snapshot_count=snapshot_count)
            figures = fio.finish(running)  # fails if a single request did
        finally:
            if running.poll() is None:
                running.kill()
                running.wait()
        lines = (line for log in Path(folder).glob("fio_lat.*.log") for line in log.open())
        writes = sorted(writes_of(lines), key=lambda write: write.replied_s)
    # The log tells Unix time, the windows that of the monotonic clock.
    ahead_s = time.time() - time.monotonic()
    there = [Window(begin_s=w.begin_s + ahead_s, end_s=w.end_s + ahead_s) for w in windows]
    if len(there) < snapshot_count or not writes or there[-1].end_s > writes[-1].replied_s:
        raise PeerError("the snapshots took longer than fio ran: fewer --snapshots")
    return {**stall_figures(writes, there), "requests_per_s": figures["iops"]}


def writes_of(lines: Iterable[str]) -> Iterator[Write]:
    """The requests of a latency log of fio: milliseconds of the reply, nanoseconds it took, ..."""
    for line in lines:
        replied_ms, took_ns, *_ = line.split(",")
        replied_s = int(replied_ms) / 1e3
        yield Write(replied_s - int(took_ns) / 1e9, replied_s)


def stall_figures(writes: Sequence[Write], windows: Sequence[Window]) -> dict[str, float]:
    """Longest writes around each snapshot, and in quiet windows of about the same length before."""
    stalls = [longest_ms(writes, w.begin_s, w.end_s + AFTER_SNAPSHOT_S) for w in windows]
    quiet = [longest_ms(writes, w.begin_s, w.end_s) for w in map(quiet_before, windows)]
    return {
        "p50_ms": rank(stalls, 0.5),
        "p90_ms": rank(stalls, 0.9),
        "p99_ms": rank(stalls, 0.99),
        "max_ms": max(stalls),
        "quiet_p50_ms": rank(quiet, 0.5),
        "quiet_p99_ms": rank(quiet, 0.99),
        "snapshot_p50_ms": rank([(w.end_s - w.begin_s) * 1e3 for w in windows], 0.5),
    }


def longest_ms(writes: Sequence[Write], low_s: float, high_s: float) -> float:
    """How long the longest request took that was under way in the window."""
    took = (w.replied_s - w.sent_s for w in writes if w.replied_s >= low_s and w.sent_s <= high_s)
    return max(took, default=0.0) * 1e3
