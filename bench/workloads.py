"""The rows: which I/O, on which part of the disk, on servers in which role.

Regions are counted in sixteenths of the disk; every region for first writes belongs to one row
alone. Quarters 1 and 3 (sixteenths 0-3 and 8-11) are what the role HALF selects.
"""

import enum
from dataclasses import dataclass

from bench.targets import Role
from bench.units import BLOCK_BYTES, KIB, MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ForSeconds:
    """As much as fits into the time of a steady row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OneIn:
    """One request in so many of the region's blocks, at random.

    A density, so that a design that copies 64 KiB clusters gains as little from its neighbours at
    every disk size.
    """

    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The whole region, once; `is_timed` ends it after the time of a steady row."""

    is_timed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """Bursts that a write buffer may absorb, on fresh blocks, a flush and a rest between."""


Amount = ForSeconds | OneIn | Whole | Bursts


class Mode(enum.Enum):
    """The runs that a row belongs to."""

    IO = "io"
    SYNC = "sync"
    DIRECT = "direct"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One workload."""

    name: str
    roles: frozenset[Role]
    pattern: str
    request_bytes: int
    depth: int
    first_sixteenth: float
    sixteenths: float
    amount: Amount
    flush_every: int = 0
    connection_count: int = 1
    modes: frozenset[Mode] = frozenset({Mode.IO})

    @property
    def is_first_write(self) -> bool:
        """Whether its blocks are fresh in this session; such rows include the flush."""
        return self.name.startswith(("fw", "burst", "uw", "tw"))

    def region(self, size_bytes: int) -> tuple[int, int]:
        """(offset, length) on a disk of that size."""
        unit = size_bytes // 16
        length = max(int(self.sixteenths * unit) // MIB * MIB, MIB)
        return int(self.first_sixteenth * unit), length

    def request_count(self, size_bytes: int, *, scale: float) -> int | None:
        """How many requests the row makes at most; None if only time limits it."""
        available = self.region(size_bytes)[1] // self.request_bytes
        if isinstance(self.amount, OneIn):
            return max(1, int(available // self.amount.blocks * scale))
        return available if isinstance(self.amount, Whole) else None

    def is_timed(self) -> bool:
        """Whether the time of a steady row ends it."""
        return isinstance(self.amount, ForSeconds) or (
            isinstance(self.amount, Whole) and self.amount.is_timed
        )


_RAW_SNAP = frozenset({Role.RAW, Role.SNAPSHOT})
_ALL_BUT_SEVERAL = frozenset({Role.RAW, Role.SNAPSHOT, Role.HALF})
_RAW_SNAP_SEVERAL = frozenset({Role.RAW, Role.SNAPSHOT, Role.SEVERAL})
_RAW_HALF = frozenset({Role.RAW, Role.HALF})
_RAW_BOOKMARK = frozenset({Role.RAW, Role.BOOKMARK})
_IO_SYNC = frozenset({Mode.IO, Mode.SYNC})
_IO_DIRECT = frozenset({Mode.IO, Mode.DIRECT})
_SYNC = frozenset({Mode.SYNC})
_STEADY = ForSeconds()
_UNTIL_FULL = Whole(is_timed=True)


def _row(
    name: str,
    requests: tuple[str, int, int],
    region: tuple[float, float],
    amount: Amount,
    *,
    roles: frozenset[Role] = _RAW_SNAP,
    flush_every: int = 0,
    connections: int = 1,
    modes: frozenset[Mode] = frozenset({Mode.IO}),
) -> Row:
    """A row; `requests` are fio's pattern, their size and how many are in flight."""
    pattern, request_bytes, depth = requests
    return Row(
        name=name,
        roles=roles,
        pattern=pattern,
        request_bytes=request_bytes,
        depth=depth,
        first_sixteenth=region[0],
        sixteenths=region[1],
        amount=amount,
        flush_every=flush_every,
        connection_count=connections,
        modes=modes,
    )


_4K, _64K, _1M = BLOCK_BYTES, 64 * KIB, MIB
_DISK, _SETTLED = (0, 16), (0, 1)

ROWS: tuple[Row, ...] = (
    # Writes the region whose rewriting is measured below, so that it is settled.
    _row("fw1m_seq_pre", ("write", _1M, 4), _SETTLED, Whole(), modes=_IO_SYNC),
    _row("rr4k_q1", ("randread", _4K, 1), _DISK, _STEADY, modes=_IO_DIRECT),
    _row(
        "rr4k_q32", ("randread", _4K, 32), _DISK, _STEADY, roles=_ALL_BUT_SEVERAL, modes=_IO_DIRECT
    ),
    _row("rr4k_q32_2c", ("randread", _4K, 32), _DISK, _STEADY, connections=2),
    _row("rw4k_q1", ("randwrite", _4K, 1), _SETTLED, _STEADY),
    _row("rw4k_q32", ("randwrite", _4K, 32), _SETTLED, _STEADY),
    _row("rw4k_q32_2c", ("randwrite", _4K, 32), _SETTLED, _STEADY, connections=2),
    _row("rw4k_fsync1", ("randwrite", _4K, 1), _SETTLED, _STEADY, flush_every=1, modes=_IO_SYNC),
    _row("rw4k_fsync32", ("randwrite", _4K, 32), _SETTLED, _STEADY, flush_every=32, modes=_IO_SYNC),
    _row("sr1m", ("read", _1M, 4), _DISK, _STEADY),
    _row("fw64k_seq", ("write", _64K, 4), (1, 1), Whole()),
    _row("fw1m_seq", ("write", _1M, 4), (2, 2), Whole()),
    _row("fw4k_q1", ("randwrite", _4K, 1), (4, 4), OneIn(blocks=16), roles=_RAW_SNAP_SEVERAL),
    _row("fw4k_q32", ("randwrite", _4K, 32), (8, 4), OneIn(blocks=8), roles=_RAW_SNAP_SEVERAL),
    _row("burst4k_q32", ("randwrite", _4K, 32), (12, 1), Bursts()),
    _row("burst4k_q1", ("randwrite", _4K, 1), (13, 1), Bursts()),
    _row("fw4k_fsync1", ("randwrite", _4K, 1), (14, 0.5), _UNTIL_FULL, flush_every=1, modes=_SYNC),
    _row(
        "fw4k_fsync32",
        ("randwrite", _4K, 32),
        (14.5, 0.5),
        _UNTIL_FULL,
        flush_every=32,
        modes=_SYNC,
    ),
    # Sixteenth 15 is not selected by HALF: writes there must cost what they cost without a
    # snapshot.
    _row("uw4k_q1", ("randwrite", _4K, 1), (15, 1), _STEADY, roles=_RAW_HALF),
    _row("uw4k_q32", ("randwrite", _4K, 32), (15, 1), _STEADY, roles=_RAW_HALF),
    # Tracked by a bookmark, preserved for nobody: a record a mebibyte, then a bit a block.
    # Each write is the first of its block: a rewrite costs nobody anything.
    _row("tw4k_q1", ("randwrite", _4K, 1), (15, 0.5), OneIn(blocks=4), roles=_RAW_BOOKMARK),
    _row("tw4k_q32", ("randwrite", _4K, 32), (15.5, 0.25), OneIn(blocks=4), roles=_RAW_BOOKMARK),
    _row(
        "tw4k_fsync1",
        ("randwrite", _4K, 1),
        (15.75, 0.25),
        _UNTIL_FULL,
        roles=_RAW_BOOKMARK,
        flush_every=1,
        modes=_SYNC,
    ),
)

VIEW_ROWS = ("view_alone", "view_r64k_busy", "view_w4k_busy")
"""Reading the snapshot alone, while a writer runs, and that writer (on a raw server: the main
export)."""

ROW_NAMES = (*(row.name for row in ROWS), *VIEW_ROWS)


def rows_for(mode: Mode, role: Role, *, only: frozenset[str] = frozenset()) -> list[Row]:
    """The rows that a server in that role runs, all of them or only those named."""
    return [
        row
        for row in ROWS
        if mode in row.modes and role in row.roles and (not only or row.name in only)
    ]
