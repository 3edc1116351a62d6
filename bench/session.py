"""One life of one server under all its rows."""

import hashlib
import subprocess
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from bench import fio, machine
from bench.errors import BenchError, PeerError
from bench.estimate import median
from bench.nbd import PIECE_BYTES, NbdClient
from bench.peers import tool
from bench.results import Session
from bench.targets import Role, Target, quarters
from bench.units import BLOCK_BYTES, KIB, MIB
from bench.workloads import Bursts, Mode, Row, rows_for

BURST_REST_S = 0.1
VIEW_REQUEST_BYTES = 64 * KIB
VIEW_WRITER_LEAD_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How long, how much, and which rows."""

    seconds: float = 2.0
    scale: float = 1.0
    burst_bytes: int = 16 * MIB
    burst_count: int = 3
    only: frozenset[str] = frozenset()
    is_verified: bool = True


def run_session(target: Target, *, round_index: int, mode: Mode, options: Options) -> Session:
    """Start the server, bring it into its role, run its rows, prove its view, stop it.

    A row that fails leaves a failure and the next row runs; a server that fails leaves a failed
    session.
    """
    meter = machine.OthersMeter()
    rows: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    figures: dict[str, float] = {}
    is_view_intact: bool | None = None
    try:
        target.start()
        target.enter_role()
        before = _original_hash(target) if options.is_verified else None
        for row in rows_for(mode, target.role, only=options.only):
            try:
                rows[row.name] = _run_row(target, row, mode=mode, options=options)
            except BenchError as error:
                failures[row.name] = str(error)
        if mode is Mode.IO and _reads_view(target, options):
            try:
                rows.update(_run_view_rows(target, options=options))
            except BenchError as error:
                failures["view_r64k_busy"] = str(error)
        if before is not None:
            is_view_intact = _is_view_intact(target, before)
        figures = _session_figures(target)
    except (BenchError, OSError) as error:
        failures["session"] = f"{type(error).__name__}: {error}"
    finally:
        target.stop()
    figures["others_cores"] = meter.cores()
    return Session(
        target=_full_name(target),
        round_index=round_index,
        rows=rows,
        failures=failures,
        figures=figures,
        is_view_intact=is_view_intact,
    )


def measure(target: Target, job: fio.Job, *, settles: bool = False) -> dict[str, float]:
    """Run a job on a server; its CPU per request includes the flush afterwards if it `settles`."""
    before_s = target.process.cpu_s()
    figures = fio.run(job)
    if settles:
        target.settle()
    spent_s = target.process.cpu_s() - before_s
    return {**figures, "cpu_us_per_request": spent_s / figures["requests"] * 1e6}


def _full_name(target: Target) -> str:
    name = target.name
    if name.role is target.plain_role:
        return name.server
    suffix = f"k{name.snapshot_count}" if name.role is Role.SEVERAL else name.role.value
    return f"{name.server}@{suffix}"


def _run_row(target: Target, row: Row, *, mode: Mode, options: Options) -> dict[str, float]:
    kept_before = None
    if row.is_first_write:
        target.settle()
        kept_before = target.settled_store_bytes()
    if mode is Mode.DIRECT:
        machine.evict(target.place.image)
    if isinstance(row.amount, Bursts):
        figures = _run_bursts(target, row, options=options)
    else:
        figures = measure(target, _job(target, row, options=options), settles=row.is_first_write)
    if kept_before is not None:
        kept_after = target.settled_store_bytes()
        assert kept_after is not None, "a server that told its store's size once tells it again"
        figures["kept_bytes_per_request"] = (kept_after - kept_before) / figures["requests"]
    return figures


def _job(target: Target, row: Row, *, options: Options) -> fio.Job:
    size_bytes = target.place.size_bytes
    offset, length = row.region(size_bytes)
    return fio.Job(
        uri=target.uri,
        pattern=row.pattern,
        request_bytes=row.request_bytes,
        depth=row.depth,
        offset=offset,
        length=length,
        runtime_s=options.seconds if row.is_timed() else None,
        request_count=row.request_count(size_bytes, scale=options.scale),
        flush_every=row.flush_every,
        connection_count=row.connection_count,
    )


def _run_bursts(target: Target, row: Row, *, options: Options) -> dict[str, float]:
    offset, length = row.region(target.place.size_bytes)
    part = length // options.burst_count // BLOCK_BYTES * BLOCK_BYTES
    each = []
    for index in range(options.burst_count):
        job = fio.Job(
            uri=target.uri,
            pattern=row.pattern,
            request_bytes=row.request_bytes,
            depth=row.depth,
            offset=offset + index * part,
            length=part,
            request_count=min(options.burst_bytes, part) // row.request_bytes,
        )
        each.append(measure(target, job, settles=True))
        time.sleep(BURST_REST_S)
    merged = {name: median(b.get(name) for b in each) for name in each[0]}
    requests = sum(burst["requests"] for burst in each)
    present = {name: value for name, value in merged.items() if value is not None}
    spent_s = sum(burst["requests"] / burst["iops"] for burst in each)
    return {**present, "requests": requests, "iops": requests / spent_s}


def _reads_view(target: Target, options: Options) -> bool:
    is_wanted = not options.only or any(name.startswith("view") for name in options.only)
    has_one = target.role is Role.SNAPSHOT and target.view_uri is not None
    return is_wanted and (has_one or target.role is Role.RAW)


def _run_view_rows(target: Target, *, options: Options) -> dict[str, dict[str, float]]:
    """Read the snapshot alone and beside a writer; on a raw server the same reads of the main
    export, the base line.

    The reader stays in the quarter that every role preserves.
    """
    unit = target.place.size_bytes // 16
    reader = fio.Job(
        uri=target.view_uri or target.uri,
        pattern="randread",
        request_bytes=VIEW_REQUEST_BYTES,
        depth=4,
        offset=0,
        length=4 * unit,
        runtime_s=options.seconds,
    )
    writer = fio.Job(
        uri=target.uri,
        pattern="randwrite",
        request_bytes=BLOCK_BYTES,
        depth=8,
        offset=0,
        length=unit,
        runtime_s=options.seconds + 2 * VIEW_WRITER_LEAD_S,
    )
    rows = {"view_alone": measure(target, reader)}
    writing = fio.start(writer)
    try:
        time.sleep(VIEW_WRITER_LEAD_S)
        # Without CPU: it could not be told from that of the writer's requests.
        rows["view_r64k_busy"] = fio.run(reader)
    finally:
        rows["view_w4k_busy"] = fio.finish(writing)
    return rows


def _session_figures(target: Target) -> dict[str, float]:
    figures = {
        "peak_rss_mib": target.process.peak_rss_kib() / KIB,
        "pss_mib": target.process.pss_kib() / KIB,
        "store_mib": machine.disk_usage_bytes(target.directory) / MIB,
    }
    for name, value in (
        ("snapshot_ms", target.snapshot_s),
        ("view_ready_ms", target.view_ready_s),
    ):
        if value is not None:
            figures[name] = value * 1e3
    return figures


# -- proof of the view


def _selected(target: Target) -> list[tuple[int, int]]:
    size_bytes = target.place.size_bytes
    return quarters(size_bytes) if target.role is Role.HALF else [(0, size_bytes)]


def _original_hash(target: Target) -> str | None:
    if target.view_uri is None:
        return None
    return _hash(_file_pieces(target.place.image, _selected(target)))


def _is_view_intact(target: Target, before: str) -> bool:
    """Compare the view with what the image held at the instant.

    Twice where that is possible: by plain reads, and by nbdcopy, that is with block status,
    several connections and holes.
    """
    assert target.view_uri is not None
    target.settle()
    if _hash(_view_pieces(target.view_uri, _selected(target))) != before:
        return False
    return target.role is Role.HALF or _hash(_copied_pieces(target.view_uri)) == before


def _hash(pieces: Iterable[bytes]) -> str:
    digest = hashlib.blake2b()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _pieces(extents: list[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    for start, end in extents:
        for offset in range(start, end, PIECE_BYTES):
            yield offset, min(PIECE_BYTES, end - offset)


def _file_pieces(path: Path, extents: list[tuple[int, int]]) -> Iterable[bytes]:
    with path.open("rb", buffering=0) as file:
        for offset, length in _pieces(extents):
            file.seek(offset)
            yield file.read(length)


def _view_pieces(uri: str, extents: list[tuple[int, int]]) -> Iterable[bytes]:
    with NbdClient(uri) as client:
        for offset, length in _pieces(extents):
            yield client.pread(offset=offset, length=length)


def _copied_pieces(uri: str) -> Iterable[bytes]:
    nbdcopy = tool("nbdcopy", package="libnbd-bin")
    copying = subprocess.Popen([nbdcopy, uri, "-"], stdout=subprocess.PIPE)
    assert copying.stdout is not None
    with closing(copying.stdout) as stream:
        while piece := stream.read(PIECE_BYTES):
            yield piece
    if copying.wait():
        raise PeerError("nbdcopy could not read the view")
