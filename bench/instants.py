"""What taking a snapshot costs: the pause clients see, the time it takes, the memory it keeps."""

import array
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench import machine, registry
from bench.errors import BenchError, PeerError
from bench.estimate import rank
from bench.probe import REPOSITORY, run_probe
from bench.process import tail
from bench.results import Session
from bench.rounds import interleave, visit_of
from bench.stillblock_target import TERMS_MAX
from bench.targets import Place, Role, Target
from bench.units import BLOCK_BYTES, GIB, KIB, MIB, format_size

WRITER_REGION_BYTES = 256 * MIB
WRITER_DEPTH = 8
WRITER_LEAD_S = 0.5
AFTER_SNAPSHOT_S = 0.1
PSS_REST_S = 0.3
WRITER_LIMIT_S = 120.0
SNAPSHOT_DISKS_BYTES = (1 * GIB, 16 * GIB, 256 * GIB)


Watch = Callable[[Target, int], dict[str, float]]
"""What clients see of a server while so many snapshots of its disk are taken."""


def watch_snapshots(
    names: Sequence[str],
    *,
    label: str,
    watch: Watch,
    place: Place,
    size_bytes: int,
    snapshot_count: int,
    round_count: int,
) -> Iterator[Session]:
    """What clients see of a sparse disk while it is snapshot every second."""
    if not place.image.exists():
        machine.fill_sparse(place.image, size_bytes=size_bytes, used_bytes=WRITER_REGION_BYTES)
    visit = visit_of(place, lambda target: {label: watch(target, snapshot_count)})
    wanted = [name for name in names if registry.parse(name).role is Role.SNAPSHOT]
    yield from interleave(wanted, round_count=round_count, label=label, visit=visit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The time of one snapshot, from the call to its return, on the monotonic clock."""

    begin_s: float
    end_s: float


def quiet_before(window: Window) -> Window:
    """The quiet time of about the same length before a snapshot's."""
    length_s = min(window.end_s - window.begin_s, AFTER_SNAPSHOT_S) + AFTER_SNAPSHOT_S
    end_s = window.begin_s - 0.05
    return Window(begin_s=end_s - length_s, end_s=end_s)


def stall_figures(stamps_s: Sequence[float], windows: Sequence[Window]) -> dict[str, float]:
    """Longest gaps between receipts around each snapshot, and in quiet windows of about the same
    length before."""
    gaps = [_longest_gap_ms(stamps_s, w.begin_s, w.end_s + AFTER_SNAPSHOT_S) for w in windows]
    quiet = [_longest_gap_ms(stamps_s, w.begin_s, w.end_s) for w in map(quiet_before, windows)]
    took_ms = [(w.end_s - w.begin_s) * 1e3 for w in windows]
    return {
        "p50_ms": rank(gaps, 0.5),
        "p99_ms": rank(gaps, 0.99),
        "max_ms": max(gaps),
        "quiet_p50_ms": rank(quiet, 0.5),
        "quiet_p99_ms": rank(quiet, 0.99),
        "snapshot_p50_ms": rank(took_ms, 0.5),
        "receipts_per_s": len(stamps_s) / (stamps_s[-1] - stamps_s[0]),
    }


def _longest_gap_ms(stamps_s: Sequence[float], low_s: float, high_s: float) -> float:
    """The longest gap that touches the window."""
    gaps = [b - a for a, b in pairwise(stamps_s) if b >= low_s and a <= high_s]
    return max(gaps, default=0.0) * 1e3


def watch_receipts(target: Target, snapshot_count: int) -> dict[str, float]:
    """The longest gap that a deep writer sees around each snapshot."""
    out = target.place.scratch / "stamps"
    seconds = snapshot_count + 3 * WRITER_LEAD_S
    arguments = (WRITER_REGION_BYTES, WRITER_DEPTH, seconds, out)
    with target.log.open("ab") as sink:
        writer = subprocess.Popen(
            [sys.executable, "-m", "bench.writer", target.uri, *map(str, arguments)],
            cwd=REPOSITORY,
            stderr=sink,
        )
    try:
        windows = snapshot_every_second(target, writer, snapshot_count=snapshot_count)
        if writer.wait(WRITER_LIMIT_S):
            raise PeerError(f"the writer failed: {tail(target.log)}")
    except subprocess.TimeoutExpired as error:
        raise PeerError("the writer does not end") from error
    finally:
        if writer.poll() is None:
            writer.kill()
            writer.wait()
    stamps = array.array("d")
    stamps.frombytes(out.read_bytes())
    if len(windows) < snapshot_count or windows[-1].end_s > stamps[-1]:
        raise PeerError("the snapshots took longer than the writer ran: fewer --snapshots")
    return stall_figures(stamps, windows)


def snapshot_every_second(
    target: Target,
    writer: "subprocess.Popen[bytes] | subprocess.Popen[str]",
    *,
    snapshot_count: int,
) -> list[Window]:
    """Take and delete so many snapshots, as long as the writer runs; return when each was taken."""
    begin_s = time.monotonic() + WRITER_LEAD_S
    windows = []
    for number in range(1, snapshot_count + 1):
        _sleep_until(begin_s + number)
        called_s = time.monotonic()
        target.take_snapshot(number)
        windows.append(Window(begin_s=called_s, end_s=time.monotonic()))
        # Deleted outside the measured windows; otherwise they would pile up.
        _sleep_until(begin_s + number + 0.5)
        target.delete_snapshot(number)
        if writer.poll() is not None:
            break
    return windows


def _sleep_until(moment_s: float) -> None:
    time.sleep(max(0.0, moment_s - time.monotonic()))


# -- memory per further snapshot


def scattered_extents(size_bytes: int, *, count: int, seed: int) -> list[tuple[int, int]]:
    """That many extents, each at a random place and of random length in its part of the disk."""
    draw = random.Random(seed)
    step = size_bytes // count
    half = step // BLOCK_BYTES // 2
    extents = []
    for index in range(count):
        start = index * step // BLOCK_BYTES * BLOCK_BYTES + draw.randrange(half) * BLOCK_BYTES
        extents.append((start, start + BLOCK_BYTES * (1 + draw.randrange(half))))
    return extents


def measure_memory(
    names: Sequence[str],
    *,
    place: Place,
    size_bytes: int,
    plans: Sequence[tuple[int, int]],
    round_count: int,
) -> Iterator[Session]:
    """PSS per further snapshot; plans are (extents in each selection, further snapshots).

    Of the server, or, where a selection has more extents than one request may name, of a process
    that takes the snapshots through the library.
    """
    if not place.image.exists():
        machine.fill_sparse(place.image, size_bytes=size_bytes, used_bytes=MIB)

    def visit(name: str, round_index: int) -> Session:
        rows: dict[str, dict[str, float]] = {}
        failures: dict[str, str] = {}
        meter = machine.OthersMeter()
        for extent_count, further in plans:
            measure = _kib_of_server if extent_count <= TERMS_MAX else _kib_of_library
            for sameness in ("different", "same"):
                row = f"mem_{extent_count}_{sameness}"
                try:
                    kib = measure(name, place, extent_count, further, sameness)
                    rows[row] = {"kib_per_snapshot": kib}
                except (BenchError, OSError) as error:
                    failures[row] = str(error)
        return Session(
            target=name,
            round_index=round_index,
            rows=rows,
            failures=failures,
            figures={"others_cores": meter.cores()},
        )

    wanted = [name for name in names if name == registry.OURS]
    yield from interleave(wanted, round_count=round_count, label="mem", visit=visit)


def _kib_of_server(
    name: str, place: Place, extent_count: int, further: int, sameness: str
) -> float:
    target = registry.make(name, place=place)
    try:
        target.start()
        # The first two are not counted: they warm up what is allocated once.
        before_kib = 0.0
        for number in range(1, further + 3):
            seed = 0 if sameness == "same" else number
            extents = scattered_extents(place.size_bytes, count=extent_count, seed=seed)
            target.take_snapshot(number, extents=extents)
            if number == 2:
                time.sleep(PSS_REST_S)
                before_kib = target.process.pss_kib()
        time.sleep(PSS_REST_S)
        return (target.process.pss_kib() - before_kib) / further
    finally:
        target.stop()


def _kib_of_library(_: str, place: Place, extent_count: int, further: int, sameness: str) -> float:
    store = place.scratch / "store"
    try:
        run_probe("create", store, str(place.image))
        figures = run_probe("select", store, str(extent_count), str(further), sameness)
        return figures["kib_per_snapshot"]
    finally:
        shutil.rmtree(store, ignore_errors=True)


# -- time to take a snapshot


def measure_snapshot_times(
    names: Sequence[str], *, place: Place, round_count: int
) -> Iterator[Session]:
    """How long a snapshot of a sparse, idle disk takes until it is in force and readable."""

    def visit(name: str, round_index: int) -> Session:
        rows: dict[str, dict[str, float]] = {}
        failures: dict[str, str] = {}
        for size_bytes in SNAPSHOT_DISKS_BYTES:
            row = f"snap_{format_size(size_bytes)}"
            image = place.scratch / f"sparse-{format_size(size_bytes)}.img"
            if not image.exists():
                machine.fill_sparse(image, size_bytes=size_bytes, used_bytes=MIB)
            here = Place(
                scratch=place.scratch,
                image=image,
                is_direct=place.is_direct,
                qemu_aio=place.qemu_aio,
            )
            target = registry.make(name, place=here)
            try:
                target.start()
                before_kib = target.process.peak_rss_kib()
                target.enter_role()
                grown_kib = target.process.peak_rss_kib() - before_kib
                rows[row] = {
                    "snapshot_ms": (target.snapshot_s or 0.0) * 1e3,
                    "view_ready_ms": (target.view_ready_s or 0.0) * 1e3,
                    "rss_growth_mib": grown_kib / KIB,
                }
            except (BenchError, OSError) as error:
                failures[row] = str(error)
            finally:
                target.stop()
        return Session(target=name, round_index=round_index, rows=rows, failures=failures)

    wanted = [name for name in names if registry.parse(name).role is Role.SNAPSHOT]
    yield from interleave(wanted, round_count=round_count, label="snap", visit=visit)
