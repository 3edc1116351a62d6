"""The goals: what must hold, what we aim for, and where each is measured.

M1 to M4 are the first marks, the others the goals by number. Goals against ourselves are judged by
server CPU per request with throughput beside it, see bench/goals.py.
"""

from dataclasses import dataclass, replace

from bench.estimate import Estimate
from bench.registry import (
    NBDKIT,
    OURS,
    OURS_HALF,
    OURS_RAW,
    OURS_SEVERAL,
    QEMU_NBD,
    QSD_CBW,
    QSD_RAW,
)
from bench.results import Cell, Results, ratios, values

IOPS, CPU = "iops", "cpu_us_per_request"

Marks = tuple[float, float | None]
"""What must hold, and the aim if there is one."""
At = tuple[str, str]
"""A target and a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A figure of one cell, or its ratio to the same figure of another within each round."""

    top: Cell
    figure: str
    bottom: Cell | None = None

    def measured(self, results: Results, kind: str) -> list[float]:
        """The value in every round that has it."""
        run = results.run(kind)
        if self.bottom is None:
            return values(run, self.top, self.figure)
        return ratios(run, self.top, self.bottom, self.figure)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What must hold, what we aim for, and where it is measured."""

    number: str
    what: str
    must: float
    aim: float | None
    run: str
    quantity: Quantity
    is_floor: bool = True
    """Whether the figure must be at least `must`, or at most."""
    beside: Quantity | None = None
    beside_label: str = ""
    is_judged_by_cpu: bool = False
    """Whether `quantity` is CPU and `beside` throughput, so that the judge may exchange them."""
    digits: int = 2
    remark_figure: str = ""

    def is_reached(self, mark: float | None, measured: Estimate) -> bool:
        """Whether the interval reaches the mark."""
        if mark is None:
            return False
        return measured.high >= mark if self.is_floor else measured.low <= mark

    def is_median_short(self, measured: Estimate) -> bool:
        """Whether only the interval reaches what must hold."""
        return measured.median < self.must if self.is_floor else measured.median > self.must


# -- the table


def _ratio(top: At, bottom: At, figure: str = IOPS) -> Quantity:
    return Quantity(
        top=Cell(target=top[0], row=top[1]),
        bottom=Cell(target=bottom[0], row=bottom[1]),
        figure=figure,
    )


def _plain(target: str, row: str, figure: str) -> Quantity:
    return Quantity(top=Cell(target=target, row=row), figure=figure)


def _against_peer(number: str, what: str, marks: Marks, ours: At, peer: str) -> Goal:
    """Throughput against a peer, our share of its CPU beside it."""
    must, aim = marks
    return Goal(
        number=number,
        what=what,
        must=must,
        aim=aim,
        run="io",
        quantity=_ratio(ours, (peer, ours[1])),
        beside=_ratio(ours, (peer, ours[1]), CPU),
        beside_label="CPU",
    )


def _against_raw(number: str, what: str, marks: Marks, ours: At) -> Goal:
    """Against our own server without a snapshot: raw CPU over ours, throughput beside it."""
    must, aim = marks
    raw = (OURS_RAW, ours[1])
    return Goal(
        number=number,
        what=what,
        must=must,
        aim=aim,
        run="io",
        quantity=_ratio(raw, ours, CPU),
        beside=_ratio(ours, raw),
        beside_label="throughput",
        is_judged_by_cpu=True,
    )


def _ceiling(number: str, what: str, marks: Marks, quantity: Quantity, *, run: str = "io") -> Goal:
    """A figure that may be at most so much."""
    must, aim = marks
    return Goal(
        number=number, what=what, must=must, aim=aim, run=run, quantity=quantity, is_floor=False
    )


def _floor(number: str, what: str, marks: Marks, quantity: Quantity, *, run: str = "io") -> Goal:
    """A figure that must be at least so much."""
    must, aim = marks
    return Goal(number=number, what=what, must=must, aim=aim, run=run, quantity=quantity)


def _synced(number: str, what: str, marks: Marks, *, every: int) -> Goal:
    """First writes with flushes, beside the limit that the disk sets."""
    must, aim = marks
    row = f"fw4k_fsync{every}"
    return Goal(
        number=number,
        what=what,
        must=must,
        aim=aim,
        run="sync",
        quantity=_ratio((OURS, row), (OURS_RAW, row)),
        remark_figure=f"limit_{every}",
    )


def _memory(extent_count: int, must_kib: float) -> Goal:
    row = f"mem_{extent_count}"
    return Goal(
        number="18",
        what=f"KiB per further snapshot of 256 GiB, {extent_count:,} extents",
        must=must_kib,
        aim=None,
        run="mem",
        quantity=_plain(OURS, f"{row}_different", "kib_per_snapshot"),
        beside=_plain(OURS, f"{row}_same", "kib_per_snapshot"),
        beside_label="equal selections",
        is_floor=False,
        digits=1,
    )


_FW, _READ, _WRITE = "fw4k_q32", "rr4k_q32", "rw4k_q32"
_VIEW = "view_r64k_busy"
_CPU_AGAINST_CBW = _ratio((OURS, _FW), (QSD_CBW, _FW), CPU)

FIRST_MARKS: tuple[Goal, ...] = (
    _against_peer("M1", "4K first write, depth 32, against QEMU CBW", (4, 6), (OURS, _FW), QSD_CBW),
    _against_peer(
        "M2", "no snapshot, 4K depth 32 read, against qemu-nbd", (2, 3), (OURS_RAW, _READ), QEMU_NBD
    ),
    _against_peer(
        "M2",
        "no snapshot, 4K depth 32 write, against qemu-nbd",
        (2, 3),
        (OURS_RAW, _WRITE),
        QEMU_NBD,
    ),
    _against_peer(
        "M3", "64K read of a snapshot, against QEMU's", (1, 1.5), (OURS, "view_alone"), QSD_CBW
    ),
    _against_peer(
        "M3",
        "64K read of a snapshot while written, against QEMU's",
        (1, 1.5),
        (OURS, _VIEW),
        QSD_CBW,
    ),
    _ceiling("M4", "server CPU per 4K first write, against QEMU CBW", (0.3, 0.2), _CPU_AGAINST_CBW),
)

_OURS_AGAINST_OTHERS: tuple[Goal, ...] = (
    _against_peer(
        "1", "no snapshot, 4K depth 32 read, against QEMU raw", (3, 5), (OURS_RAW, _READ), QSD_RAW
    ),
    _against_peer(
        "1", "no snapshot, 4K depth 32 write, against QEMU raw", (3, 5), (OURS_RAW, _WRITE), QSD_RAW
    ),
    _against_peer(
        "2", "no snapshot, 4K depth 32 read, against nbdkit", (1, 1.4), (OURS_RAW, _READ), NBDKIT
    ),
    _against_peer(
        "2", "no snapshot, 4K depth 32 write, against nbdkit", (1, 1.4), (OURS_RAW, _WRITE), NBDKIT
    ),
)

_REQUESTS: tuple[Goal, ...] = (
    _against_raw("3", "rewrite of settled blocks, against raw", (0.95, 1), (OURS, _WRITE)),
    _against_raw(
        "4", "write to undesignated blocks, against raw", (0.95, 1), (OURS_HALF, "uw4k_q32")
    ),
    _ceiling(
        "4",
        "bytes kept for such a write",
        (0, 0),
        _plain(OURS_HALF, "uw4k_q32", "kept_bytes_per_request"),
    ),
    _against_raw("5", "reads with a snapshot active, against raw", (0.97, 1), (OURS, _READ)),
    _against_peer("6", "4K first write, depth 32, against QEMU CBW", (6, 12), (OURS, _FW), QSD_CBW),
    _against_raw(
        "7", "4K first write, burst, depth 32, against raw", (0.9, 1), (OURS, "burst4k_q32")
    ),
    _against_raw(
        "7", "4K first write, burst, depth 1, against raw", (0.9, 1), (OURS, "burst4k_q1")
    ),
    _against_raw("7", "4K first write, sustained, depth 32, against raw", (0.55, 0.7), (OURS, _FW)),
    _against_raw(
        "7", "4K first write, sustained, depth 1, against raw", (0.55, 0.7), (OURS, "fw4k_q1")
    ),
    _against_peer(
        "8", "64K first write, sustained, against QEMU CBW", (1.5, 3), (OURS, "fw64k_seq"), QSD_CBW
    ),
    _against_peer(
        "8", "1M first write, sustained, against QEMU CBW", (1.5, 3), (OURS, "fw1m_seq"), QSD_CBW
    ),
    Goal(
        number="9",
        what="first write with 8 snapshots against 1, cost",
        must=1.1,
        aim=1,
        run="io",
        quantity=_ratio((OURS_SEVERAL, _FW), (OURS, _FW), CPU),
        is_floor=False,
        beside=_ratio((OURS, _FW), (OURS_SEVERAL, _FW)),
        beside_label="time",
        is_judged_by_cpu=True,
    ),
    _ceiling("10", "server CPU per 4K first write, against QEMU CBW", (0.2, 0.1), _CPU_AGAINST_CBW),
)

_OTHERS: tuple[Goal, ...] = (
    _synced("11", "first write, a flush each, on a disk, against raw", (0.45, 0.5), every=1),
    _synced("12", "first write, a flush every 32, on a disk, against raw", (0.55, 0.7), every=32),
    _ceiling(
        "13",
        "pause by a snapshot of 256 GiB under load, against QEMU",
        (1, 0.3),
        _ratio((OURS, "stall"), (QSD_CBW, "stall"), "p99_ms"),
        run="stall",
    ),
    _floor(
        "14",
        "64K read of a snapshot while written, against raw",
        (0.9, 1),
        _ratio((OURS, _VIEW), (OURS_RAW, _VIEW)),
    ),
    _ceiling(
        "15",
        "p99 of first writes at depth 1, against raw",
        (2, 1.2),
        _ratio((OURS, "fw4k_q1"), (OURS_RAW, "fw4k_q1"), "p99_us"),
    ),
    _floor(
        "16",
        "two connections against one, 4K depth 32 read",
        (0.95, 1.2),
        _ratio((OURS_RAW, f"{_READ}_2c"), (OURS_RAW, _READ)),
    ),
    _floor(
        "16",
        "two connections against one, 4K depth 32 write",
        (0.95, 1.2),
        _ratio((OURS_RAW, f"{_WRITE}_2c"), (OURS_RAW, _WRITE)),
    ),
    _floor(
        "17",
        "reads past the cache, depth 32, against QEMU io_uring",
        (1, 1.3),
        _ratio((OURS_RAW, _READ), (QSD_RAW, _READ)),
        run="direct",
    ),
    _memory(10, 64),
    _memory(100_000, 2048),
    replace(
        _ceiling(
            "19",
            "bytes kept per 4K first write",
            (4160, 4128),
            _plain(OURS, _FW, "kept_bytes_per_request"),
        ),
        digits=0,
    ),
)

GOALS: tuple[Goal, ...] = (*FIRST_MARKS, *_OURS_AGAINST_OTHERS, *_REQUESTS, *_OTHERS)
"""All of them, in the order in which they are printed."""
