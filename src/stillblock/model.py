"""The values that every layer speaks: sizes, names, references, volumes, snapshots, receipts."""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from stillblock.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection

Extent = tuple[int, int]
"""A half-open byte range `(start, end)`."""

Extents = tuple[Extent, ...]

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
SECTOR_BYTES: Final = 512
LATEST: Final = "latest"
BLOCK_SIZE_DEFAULT: Final = 4096
BLOCK_SIZE_MIN: Final = 4096
BLOCK_SIZE_MAX: Final = 65536
PAUSE_LIMIT_MS_DEFAULT: Final = 2000
PAUSE_LIMIT_MS_MAX: Final = 60_000
_ID_PREFIX_MIN: Final = 4
"""An id is 16 hexadecimal digits; fewer than these are a typing error rather than a prefix."""

_NAME: Final = re.compile(NAME_PATTERN)
_SIZE: Final = re.compile(r"(\d+)\s*([A-Za-z]*)")
_UNITS: Final[dict[str, int]] = {"": 1, "b": 1, "s": SECTOR_BYTES} | {
    letter + ending: 1024**power
    for power, letter in enumerate("kmgtpe", start=1)
    for ending in ("", "ib", "b")
}
_DURATION: Final = re.compile(r"(\d{1,9})([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SIZE_BYTES_MAX: Final = 2**63 - 1
"""The largest offset a Linux block device can have."""


# Sizes, times, extents --------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Return the bytes that `4096`, `64K`, `4GiB` or `512s` (sectors) mean; units are of 1024."""
    match = _SIZE.fullmatch(text.strip())
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise UsageError(
            f"{text!r} is not a size; write bytes (4096), 1024 units (64K, 4GiB) or sectors (512s)"
        )
    size_bytes = int(match[1]) * unit
    if size_bytes > _SIZE_BYTES_MAX:
        raise UsageError(f"{text!r} is larger than any disk can be (8 EiB)")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Return a size to read: `0 B`, `512 B`, `64 KiB`, `1.5 GiB`."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes} B"
    value = size_bytes / 1024
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1023.95:
            return f"{value:.1f}".removesuffix(".0") + f" {unit}"
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + " EiB"


def parse_duration(text: str) -> int:
    """Return the seconds that `90s`, `30m`, `2h` or `7d` mean."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise UsageError(f"{text!r} is not a duration; write 90s, 30m, 2h or 7d")
    return int(match[1]) * _SECONDS[match[2]]


def format_duration(duration_ns: int) -> str:
    """Return a duration to read: `180 us`, `4.2 ms`, `1.5 s`."""
    if duration_ns < 1_000_000:
        return f"{duration_ns / 1000:.0f} us"
    if duration_ns < 1_000_000_000:
        return f"{duration_ns / 1_000_000:.1f} ms"
    return f"{duration_ns / 1_000_000_000:.1f} s"


def format_instant(unix_ns: int) -> str:
    """Return a UTC time to read and to sort: `2026-11-22T17:40:01Z`."""
    moment = dt.datetime.fromtimestamp(unix_ns // 1_000_000_000, tz=dt.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def name_for_instant(unix_ns: int) -> str:
    """Return the name a snapshot without one gets, `2026-11-22T17-40-01Z`: valid, and it sorts."""
    return format_instant(unix_ns).replace(":", "-")


def free_name(base: str, taken: Collection[str]) -> str:
    """Return the name, with a number behind it if it is taken."""
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name


def is_id_prefix(text: str, full_id: str) -> bool:
    """Whether that is enough of an id to mean it."""
    return len(text) >= _ID_PREFIX_MIN and full_id.startswith(text)


# Names and references ---------------------------------------------------------------------------


def check_name(text: str, *, what: str) -> str:
    """Return the name if it is one; `what` (volume, snapshot) is for the error."""
    if _NAME.fullmatch(text) is not None:
        return text
    raise UsageError(
        f"{text!r} is no {what} name; use 1 to 64 of A-Z a-z 0-9 . _ - "
        "and start with a letter or digit"
    )


def check_new_name(text: str, *, what: str) -> str:
    """Return the name if something new may have it."""
    check_name(text, what=what)
    if text == LATEST:
        raise UsageError(f"{LATEST!r} stands for the newest snapshot and cannot be a {what} name")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """`VOL`, `VOL@SNAP`, `VOL@SNAP+CLONE` or `REPO:VOL@BACKUP`, each with an optional `:/path`, and
    those with an instant with `:PLACE:/path`: the path inside one filesystem of several.
    """

    volume: str
    snapshot: str | None = None
    clone: str | None = None
    repository: str | None = None
    path: str | None = None
    place: str | None = None
    """As in a rule `path:PLACE:/GLOB`: a label, a uuid, a partition's number, `vg/lv`."""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Return the reference; raise `UsageError` that says which part is wrong."""
        head, colon, path = text.partition(":/")
        inner = f"/{path}" if colon else None
        before, at, after = head.partition("@")
        # Behind the instant, whose name has no colon, and only with a path: a label may have some.
        after, place_colon, place = after.partition(":") if inner else (after, "", "")
        if place_colon and not place:
            raise UsageError(f"{text!r} has two colons and no filesystem's name between them")
        head = f"{before}{at}{after}"
        repository, colon, rest = head.rpartition(":")
        volume, at, snapshot = rest.partition("@")
        snapshot, plus, clone = snapshot.partition("+")
        check_name(volume, what="volume")
        if colon:
            check_name(repository, what="repository")
        if at:
            check_name(snapshot, what="snapshot")
        if plus:
            check_name(clone, what="clone")
        if plus and colon:
            raise UsageError(f"{text!r} names a clone of a backup; only snapshots have clones")
        return cls(
            volume=volume,
            snapshot=snapshot if at else None,
            clone=clone if plus else None,
            repository=repository if colon else None,
            path=inner,
            place=place or None,
        )

    def __str__(self) -> str:
        return "".join(
            (
                f"{self.repository}:" if self.repository else "",
                self.volume,
                f"@{self.snapshot}" if self.snapshot else "",
                f"+{self.clone}" if self.clone else "",
                f":{self.place}" if self.place else "",
                f":{self.path}" if self.path else "",
            )
        )


# Volumes ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleTerm:
    """One include or exclude term as the user wrote it."""

    include: bool
    text: str
    is_low: bool = False
    """Of an inclusion: it matters less, and is given up first when the store is full."""

    @property
    def action(self) -> str:
        """`include`, `include-low` or `exclude`."""
        if not self.include:
            return "exclude"
        return "include-low" if self.is_low else "include"

    def __str__(self) -> str:
        return f"{self.action} {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedCopy:
    """Preserved content that fails its checksum: which bytes, preserved in which epoch."""

    epoch: int
    start: int
    end: int


class Consistency(StrEnum):
    """How consistent an instant is for the users of the disk. `barrier` holds at every level."""

    BARRIER = "barrier"
    """All writes acknowledged before the instant, none after: as after a power cut."""
    IDLE = "idle"
    """And nothing had been written for a while."""
    FILESYSTEM = "filesystem"
    """And filesystems, mounted here or in a guest, wrote out what they had and held still."""
    APPLICATION = "application"
    """And applications prepared for it by hooks, and filesystems, if any are named, held still."""


class Quiet(StrEnum):
    """Which writers wait for an instant."""

    DEVICE = "device"
    """All of them."""
    SELECTED = "selected"
    """Those of blocks that the snapshot selects when it is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsistencySettings:
    """A volume's standing wishes about its instants; times in milliseconds."""

    level: Consistency = Consistency.BARRIER
    or_barrier: bool = False
    """Fall back to `barrier` where the level cannot be reached, instead of taking nothing."""
    quiet: Quiet = Quiet.DEVICE
    """Which writers wait."""
    quiet_ms: int = 200
    """`idle`: for how long nothing may have been written."""
    idle_limit_ms: int = 30_000
    """`idle`: how long to wait for that."""
    mounts: tuple[str, ...] = ()
    """`filesystem`: mount points on this volume to freeze."""
    agent: str | None = None
    """`filesystem`: socket of the QEMU guest agent in the guest that uses this volume."""
    agent_mounts: tuple[str, ...] = ()
    """Mount points in the guest to freeze; empty: all it has."""
    freeze_limit_ms: int = 10_000
    """After this a filesystem is thawed, whatever happened."""
    hooks: str | None = None
    """`application`: a directory of executables."""
    hook_limit_ms: int = 30_000
    """How long each hook may take."""


class StepKind(StrEnum):
    """What was done around an instant."""

    IDLE = "idle"
    HOOK_BEFORE = "hook-before"
    HOOK_AFTER = "hook-after"
    FREEZE = "freeze"
    THAW = "thaw"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuiesceStep:
    """One thing that was done around an instant, and how it went."""

    kind: StepKind
    what: str
    """The mount point, the agent's socket, the name of the hook."""
    duration_ns: int
    is_ok: bool = True
    detail: str = ""
    """Who did it, what went wrong, what a hook said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiescing:
    """How an instant came about: the level asked and reached, and every step."""

    asked: Consistency
    reached: Consistency
    shortfall: str = ""
    """Why the level was not reached; empty if it was."""
    steps: tuple[QuiesceStep, ...] = ()
    is_quiet_selected: bool = False
    """Only writers of selected blocks waited, and only those in flight are told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeConfig:
    """What the store itself remembers about its volume; enough to import it elsewhere."""

    name: str
    created_unix_ns: int
    rules: tuple[RuleTerm, ...] = ()
    last_verified_unix_ns: int | None = None
    """When all preserved content was last read and compared with its checksums."""
    damaged: tuple[DamagedCopy, ...] = ()
    """Preserved content that was found to fail them."""
    consistency: ConsistencySettings = ConsistencySettings()


class VolumeState(StrEnum):
    """What can be said of a volume without opening it."""

    SERVED = "served"
    STOPPED = "stopped"
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeEntry:
    """A volume the catalog knows."""

    name: str
    uuid: str
    origin: str
    store: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeListing:
    """One line of `volume list`."""

    name: str
    uuid: str
    origin: str
    store: str
    state: VolumeState
    size_bytes: int | None
    note: str = ""


class OnFull(StrEnum):
    """What happens to a first change when the store has no room for the original."""

    DEGRADE = "degrade"
    """The write goes on; the snapshots lose the block."""
    HOLD = "hold"
    """The write waits until there is room."""
    FAIL = "fail"
    """The write fails."""


class UsageLevel(StrEnum):
    """How near the store is to being full."""

    OK = "ok"
    WARNING = "warning"
    """From 80 percent on."""
    CRITICAL = "critical"
    """From 95 percent on."""
    FULL = "full"
    """A first change finds no room now."""
    FAILED = "failed"
    """Not even what is lost can be recorded."""


USAGE_WARNING_PERCENT: Final = 80
USAGE_CRITICAL_PERCENT: Final = 95


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreUsage:
    """How full a volume's store is, and what happens when it is."""

    volume: str
    on_full: OnFull
    limit_bytes: int | None
    """What it may take; None: what its filesystem has."""
    used_bytes: int
    capacity_bytes: int
    """The limit, or what the filesystem lets it have if that is less."""
    percent: int
    level: UsageLevel
    held_writes: int = 0
    """Writes that wait for room."""
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeInfo:
    """An open volume."""

    name: str
    uuid: str
    origin: str
    store: str
    size_bytes: int
    block_size: int
    created_unix_ns: int
    rules: tuple[RuleTerm, ...]
    snapshot_count: int
    bookmark_count: int
    store_bytes: int
    is_served: bool
    suspect_reason: str = ""
    last_verified_unix_ns: int | None = None
    """When all preserved content was last read and compared with its checksums."""
    damaged_bytes: int = 0
    """Preserved content that is known to fail them."""
    clone_count: int = 0
    clones_bytes: int = 0
    """What all clones take in the store."""


# Snapshots --------------------------------------------------------------------------------------


class SnapshotState(StrEnum):
    """Whether a snapshot is what it was; the worst that is known."""

    OK = "ok"
    SUSPECT = "suspect"
    """Something happened that could not be seen: the origin was written by others."""
    UNDECIDED = "undecided"
    """One of a group, and whether that exists cannot be told here; kept, and not readable."""
    NARROWING = "narrowing"
    """Taken, and held; what its rules say of files and free space is still being worked out."""
    PARTIAL = "partial"
    """Some originals could not be kept; reading them is an error, the rest is right."""
    DAMAGED = "damaged"
    """Something that was kept is rotten; reading it is an error, the rest is right."""


class SnapshotPurpose(StrEnum):
    """Why a snapshot exists."""

    USER = "user"
    SAFETY = "safety"
    """Taken by a restore, so that it can be undone."""
    PROBE = "probe"
    """Taken to explain rules on a disk in use; deleted at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unresolved:
    """Where a term could not be resolved, and why; all of that is included: an exclusion leaves
    nothing out there, an inclusion takes all of it.
    """

    place: str
    """A partition, a volume, or the whole disk: `part:2`, `lv:vg/root`, `disk`."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TermOutcome:
    """What one rule term came to at one instant."""

    include: bool
    text: str
    matched_bytes: int
    contributed_bytes: int
    """Bytes whose last word this term had."""
    note: str = ""
    is_low: bool = False
    file_count: int = 0
    """Files it matched, by name."""
    extent_count: int = 0
    """Extents of the disk it matched."""
    unresolved: tuple[Unresolved, ...] = ()

    @property
    def action(self) -> str:
        """`include`, `include-low` or `exclude`."""
        return RuleTerm(include=self.include, text=self.text, is_low=self.is_low).action


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """An extent that a snapshot does not hold, and the term that left it out."""

    start: int
    end: int
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLeftOut:
    """Many extents that one term left out, in some bytes each; see docs/formats/meta.md."""

    because: str
    extents: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotGroup:
    """Snapshots of several volumes with one instant."""

    id: str
    """32 hexadecimal digits."""
    members: tuple[str, ...]
    """What they were called at the instant, `VOL@SNAP`, in the order they were asked for."""
    kept: str = ""
    """On whose word this one is kept, though nobody could tell whether the group exists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRecord:
    """What we write beside an instant in the store; the engine keeps it as opaque bytes."""

    name: str
    id: str
    purpose: SnapshotPurpose = SnapshotPurpose.USER
    is_protected: bool = False
    description: str = ""
    rules: tuple[RuleTerm, ...] = ()
    terms: tuple[TermOutcome, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    consistency: str = "barrier"
    """The level that was reached."""
    quiescing: Quiescing | None = None
    """How; None of a snapshot of an older version."""
    pause_ns: int | None = None
    in_flight: int | None = None
    commit_ns: int | None = None
    pending: str = ""
    """What the frozen view still has to tell, as selection's JSON: until then it selects more than
    its rules say. Empty: it is final."""
    is_default: bool = False
    """Nobody gave rules: these are what is left out by itself."""
    left_out_packed: tuple[PackedLeftOut, ...] = ()
    """In place of `left_out` where that is long."""
    notes: tuple[str, ...] = ()
    failure: str = ""
    """Why no term that needs a filesystem could be resolved; empty if that was tried."""
    narrowed_unix_ns: int | None = None
    """When its selection became final, if not at the instant."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of what resolved its rules."""
    digest: str = ""
    """SHA-256 of what the receipt says and must go on saying."""
    group: SnapshotGroup | None = None
    """With which others it has its instant in common; None: with nobody."""

    @property
    def is_final(self) -> bool:
        """Whether it selects what its rules say."""
        return not self.pending


@dataclass(frozen=True, slots=True, kw_only=True)
class BookmarkRecord:
    """What we write beside a bookmark in the store."""

    name: str
    id: str
    of_snapshot: str
    created_unix_ns: int


class CloneState(StrEnum):
    """Whether a clone can be used."""

    OK = "ok"
    FAILED = "failed"
    """What was written to it may be lost: it is read-only until it is reset."""
    DAMAGED = "damaged"
    """It cannot be opened; its snapshot is not concerned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneRecord:
    """What we write beside a clone in the store; the engine keeps it as opaque bytes."""

    name: str
    id: str
    expires_unix_ns: int | None = None
    """When it goes by itself, once nobody uses it."""
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneInfo:
    """A clone as lists and JSON show it."""

    volume: str
    snapshot: str
    """Empty if its snapshot is not there, or cannot be told."""
    name: str
    id: str
    number: int
    epoch: int | None
    created_unix_ns: int
    expires_unix_ns: int | None
    size_bytes: int
    own_bytes: int
    """What was written to it, in whole blocks."""
    stored_bytes: int
    """What it takes in the store; deleting it gives that back."""
    connections: int
    """Clients that use it now."""
    state: CloneState = CloneState.OK
    reason: str = ""
    """Why it is not `ok`; empty if it is."""
    description: str = ""

    @property
    def reference(self) -> str:
        """`VOL@SNAP+CLONE`."""
        return f"{self.volume}@{self.snapshot or '?'}+{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotInfo:
    """A snapshot as lists and JSON show it."""

    volume: str
    name: str
    id: str
    epoch: int
    created_unix_ns: int
    size_bytes: int
    selected_bytes: int
    preserved_bytes: int
    exclusive_bytes: int
    purpose: SnapshotPurpose
    is_protected: bool
    has_bookmark: bool
    is_suspect: bool
    suspect_reason: str
    lost_bytes: int
    holders: int
    """Views, restores and exports that hold it."""
    description: str = ""
    is_partial: bool = False
    """It lost blocks; everything else in it is right."""
    lost: Extents = ()
    lost_at_source: Extents = ()
    """Those of them that the origin could not give; the others found no room in the store."""
    low_bytes: int = 0
    """What of it is given up first when the store is full."""
    state: SnapshotState = SnapshotState.OK
    damaged_bytes: int = 0
    """Kept, and known to fail its checksum."""
    damage: str = ""
    """Why nothing of it can be read; empty if its header is there."""
    accepted: str = ""
    """Which doubt somebody accepted, and their note."""
    consistency: str = "barrier"
    """The level that was reached."""
    shortfall: str = ""
    """Why that is less than was asked for; empty if it is not."""
    is_final: bool = True
    """False: it is being narrowed, and cannot be read, cloned or restored yet."""
    group: SnapshotGroup | None = None
    """With which others it has its instant in common; None: with nobody."""
    undecided: str = ""
    """Why it is not known whether it exists; empty if it is. Nothing of it can be read then."""
    clone_count: int = 0
    """Clones of it, which go with it."""

    @property
    def reference(self) -> str:
        """`VOL@SNAP`."""
        return f"{self.volume}@{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The record of a snapshot: rules, resolved extents, what was left out and why, how, when."""

    snapshot: SnapshotInfo
    rules: tuple[RuleTerm, ...]
    terms: tuple[TermOutcome, ...]
    extents: Extents
    left_out: tuple[LeftOut, ...]
    lost: Extents
    damaged: Extents
    """Kept, and known to fail its checksum."""
    consistency: str
    """The level reached. `barrier`: all writes acknowledged before the instant, none after."""
    quiescing: Quiescing | None
    """The level asked and every step; None of a snapshot of an older version."""
    pause_ns: int | None
    """Time writes were held; None if the server died before it could be written down."""
    in_flight: int | None
    commit_ns: int | None
    is_default: bool = False
    """Nobody gave rules: these are what is left out by itself."""
    notes: tuple[str, ...] = ()
    failure: str = ""
    """Why no term that needs a filesystem could be resolved; empty if that was tried."""
    narrowed_unix_ns: int | None = None
    """When the selection became final, if not at the instant."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of what resolved the rules."""
    digest: str = ""
    """SHA-256 of all this but name, protection, description and what became of the content."""
    is_intact: bool = True
    """False: it does not come to its digest; somebody or something changed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BookmarkInfo:
    """A bookmark as lists and JSON show it."""

    volume: str
    name: str
    id: str
    epoch: int
    instant_unix_ns: int
    of_snapshot: str
    baseline_bytes: int
    has_snapshot: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What changed from one instant to another, among the blocks tracked since the first."""

    volume: str
    since: str
    until: str | None
    """None: until now."""
    extents: Extents
    changed_bytes: int
    newly_selected: Extents = ()
    """What the later instant selects and the earlier one did not hold: an increment needs it
    whole, changed or not. Nothing up to now: only an instant selects."""
    newly_selected_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreProgress:
    """How far a restore is; `is_running` false means all is on the origin."""

    volume: str
    is_running: bool
    source: str | None = None
    safety: str | None = None
    total_bytes: int = 0
    done_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInfo:
    """One name that NBD clients can ask for."""

    name: str
    uri: str
    is_read_only: bool
    contexts: tuple[str, ...]
    connections: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a volume."""

    id: int
    unix_ns: int
    volume: str
    action: str
    detail: dict[str, str | int | bool]
