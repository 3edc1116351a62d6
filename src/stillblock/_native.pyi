"""The Rust core as Python sees it. Only `stillblock.native` imports this module.

Offsets, lengths and extents are bytes; extents are half-open `(start, end)`. Every call releases the GIL.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Self, final

Extents = list[tuple[int, int]]
ClusterRuns = list[tuple[int, int, int | None]]
"""VCN, number of clusters, LCN; None is a hole."""
PlainFile = tuple[
    int, list[tuple[int, bytes]], int, int, tuple[ClusterRuns, int, int, int] | None
]
"""Sequence number, names (reference of the directory, UTF-16), time of change (100 ns since 1601), size, and unless the
data is in the record: its runs, bytes allocated, size, bytes initialised."""

def crc32c(data: bytes, seed: int = 0) -> int:
    """CRC-32C (Castagnoli) of `data`, going on from `seed`, the CRC of what comes before it."""

def plain_file(
    raw: bytes, *, number: int, cluster_size: int, cluster_count: int
) -> PlainFile | None:
    """What MFT record `number` of NTFS says, `raw` as on disk, if it is one whole file in a plain record.

    None for everything else, damage included. Sizes are in bytes, runs in clusters.
    """

class NativeError(Exception):
    """args == (kind, message). `kind` is one of: "usage", "locked", "origin_io", "origin_changed", "store_io",
    "store_damaged", "store_full", "unsupported_version", "not_found", "in_use", "pause_timeout", "snapshot_lost",
    "excluded", "recovery_needed", "undecided", "restore_running", "not_quiet", "quiesce",
    "closed", "fuse", "internal".
    """

@final
class Instant:
    """A snapshot that was committed."""

    epoch: int
    size_bytes: int
    created_unix_ns: int
    pause_ns: int
    """From the gate's closing to its opening."""
    in_flight: int
    """Writes that were in flight when the gate closed, all of them in the snapshot."""
    commit_ns: int
    """From the opening of the gate until the snapshot was durable."""

@final
class Epoch:
    """One instant the store knows: a snapshot, a bookmark, or both."""

    epoch: int
    size_bytes: int
    created_unix_ns: int
    has_snapshot: bool
    has_bookmark: bool
    selected_bytes: int
    preserved_bytes: int
    """Bytes of preserved content this snapshot can read, shared ones included."""
    exclusive_bytes: int
    """Bytes that deleting this snapshot alone would free."""
    lost: Extents
    lost_at_source: Extents
    """Those of them that the origin could not give."""
    damaged: Extents
    """Blocks whose content is there and is known to fail its checksum."""
    damage: str
    """Why nothing of the snapshot can be read, its header being gone; empty if it is there."""
    undecided: str
    """Why it is not known whether the snapshot, one of a group, exists; empty if it is. Nothing of it can be read."""
    accepted: str
    """Which doubt somebody accepted, and their note; empty if nobody had to."""
    is_suspect: bool
    suspect_reason: str
    in_use: int
    """Views, restores and exports that hold it."""
    meta: bytes
    bookmark_meta: bytes

@final
class RestoreStatus:
    source_epoch: int
    safety_epoch: int
    total_bytes: int
    done_bytes: int

@final
class Inspection:
    """What a store says of itself while nobody has it open."""

    uuid: str
    origin: str
    block_size: int
    size_bytes: int
    meta: bytes
    left_as: Literal["closed", "killed", "interrupted"]
    """By the last process: killed in this boot, or not closed in another one."""
    left_in: Literal["nothing", "lost", "buffer", "newer"]
    """What a killed process left: no buffer, one that is gone, one to replay, one of a newer version."""
    left_slots: int
    left_blocks: Extents
    differing_blocks: Extents
    """Those of which the origin holds something else now."""
    alive_unix_ns: int
    closed: tuple[int, int, int] | None
    """(inode, bytes, modified_unix_ns) of the origin when the volume was closed."""
    found: tuple[int, int, int] | None
    """The same of what is there now; None if nothing is."""
    is_touched: bool
    """Written by others since, as far as can be known."""
    origin_failure: str
    is_restoring: bool
    epochs: list[tuple[int, bool, bool, bytes, str]]
    """(epoch, has snapshot, has bookmark, meta, damage)"""

@final
class ContentCheck:
    """Preserved content compared with its checksums, a step at a time."""

    @property
    def total_bytes(self) -> int: ...
    @property
    def done_bytes(self) -> int: ...
    def step(self, bytes_max: int) -> bool:
        """Read so much more; False once all is done."""
    def damaged_blocks(self) -> int: ...

@final
class StoreUsage:
    """How full the store is, and what happens when it is."""

    on_full: Literal["degrade", "hold", "fail"]
    limit_bytes: int
    """0: what its filesystem has."""
    used_bytes: int
    capacity_bytes: int
    """Bytes it may take: the limit, or what its filesystem lets it have."""
    is_full: bool
    """A first change would find no room now."""
    held_writes: int
    failure: str
    """Why not even a loss can be recorded; empty if it can."""

@final
class Statistics:
    """Counters since the volume was opened; sizes in bytes, times in nanoseconds."""

    def as_dict(self) -> dict[str, int]: ...

@final
class Volume:
    """One origin with its store, open in this process. Thread-safe."""

    @staticmethod
    def create(
        *,
        store: str,
        origin: str,
        block_size: int,
        meta: bytes,
        on_full: Literal["degrade", "hold", "fail"] = "degrade",
        limit_bytes: int = 0,
    ) -> str:
        """Make a new store directory for the origin; return the volume's uuid (hex)."""
    @staticmethod
    def open(
        *,
        store: str,
        origin: str | None = None,
        cache: Literal["writeback", "writethrough"] = "writeback",
        direct: bool = False,
        buffer_dir: str | None = None,
        buffer_bytes: int = 67108864,
        recover: Literal["refuse", "replay", "discard"] = "refuse",
        peers: Sequence[str] = ...,
    ) -> Volume:
        """Open and lock; `peers` are stores of other volumes, asked how groups ended that this one does not know."""
    @staticmethod
    def peek(*, store: str) -> tuple[str, str, int, bytes]:
        """(uuid, origin path, block size, meta) of a store without opening the volume, even while it is served."""
    @staticmethod
    def inspect(*, store: str, origin: str | None = None) -> Inspection:
        """Look at a store that nobody has open, and at its origin; changes nothing."""
    @staticmethod
    def check_unused(*, store: str) -> None:
        """Fail if somebody has the store open, whatever is in it."""
    @staticmethod
    def waits_for(*, store: str) -> list[str]:
        """Volumes, by uuid, whose stores decide groups that this one does not know the end of; even while it is served."""
    def settle_groups(self, *, places: Sequence[str]) -> int:
        """Ask again how groups ended, in these stores too; how many snapshots are left that may not exist."""
    def keep_undecided(self, *, epoch: int, meta: bytes) -> None:
        """Keep a snapshot of which nobody can tell whether it exists, with these opaque bytes."""
    def accept_origin(self, note: str) -> int:
        """Take the origin as it is; return how many snapshots and bookmarks were in doubt."""
    def check_structure(self) -> list[tuple[bool, str]]:
        """(is lost, what) for everything in journal and log that is not as it was written."""
    def check_content(self, *, share: int = 10000, seed: int = 0) -> ContentCheck:
        """Prepare to read preserved content: all, or a share in parts of 10000 that `seed` chooses."""
    def damaged(self) -> list[tuple[int, Extents]]:
        """Rotten content that some snapshot reads, by the epoch it was preserved in."""
    def note_damaged(self, found: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> None:
        """Remember what an earlier process found."""
    @property
    def uuid(self) -> str: ...
    @property
    def origin(self) -> str: ...
    @property
    def store(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def current_epoch(self) -> int: ...
    def meta(self) -> bytes: ...
    def set_meta(self, meta: bytes) -> None: ...
    def pread(self, *, offset: int, length: int) -> bytes: ...
    def pwrite(self, data: bytes | bytearray | memoryview, *, offset: int, fua: bool = False) -> None: ...
    def write_zeroes(self, *, offset: int, length: int, may_punch: bool = True, fua: bool = False) -> None: ...
    def trim(self, *, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...
    def snapshot(
        self,
        *,
        selection: Sequence[tuple[int, int]],
        low: Sequence[tuple[int, int]] = ...,
        meta: bytes,
        pause_limit_ms: int = 2000,
        quiet_ms: int | None = None,
        holds: Literal["device", "selected"] = "device",
        passed: Callable[[], object] | None = None,
    ) -> Instant:
        """Take a snapshot; what `low` has of the selection is given up first when the store is full.

        With `quiet_ms` only if no watched write came for so long. `holds` says which writers wait: all, or those of
        selected blocks. `passed` is called once writes go on again.
        """
    @staticmethod
    def snapshot_group(
        *,
        group_id: str,
        members: Sequence[
            tuple[
                Volume,
                Sequence[tuple[int, int]],
                Sequence[tuple[int, int]],
                bytes,
                int,
                int | None,
                Literal["device", "selected"],
            ]
        ],
        passed: Callable[[], object] | None = None,
        objects: Callable[[], str | None] | None = None,
    ) -> list[Instant]:
        """Take one snapshot of each volume, all at one instant, or none.

        `group_id` has 32 hexadecimal digits and is used once. `objects` is asked once, when all is durable but the
        decision: why there are to be no snapshots, or None. A member is a volume, its `selection`, `low`, `meta`, `pause_limit_ms`,
        `quiet_ms` and `holds`, as in `snapshot`. The instants come back in the order of the members.
        """
    def watch_writes(self, *, ranges: Sequence[tuple[int, int]] | None = None) -> None:
        """Look at writes of these ranges, or of the whole disk, from now on."""
    def unwatch_writes(self) -> None: ...
    def quiet_ns(self) -> int | None:
        """How long no watched write came; None if nobody watches."""
    def watch_reads(self, *, length: int) -> None:
        """Remember where the live disk is read by requests of just this length; 0: look no more."""
    def reads_seen(self) -> list[int]:
        """The offsets of such reads."""
    def epochs(self) -> list[Epoch]: ...
    def set_epoch_meta(self, *, epoch: int, meta: bytes) -> None: ...
    def selection(self, *, epoch: int) -> Extents:
        """What the snapshot selects, else its bookmark's baseline; clipped to the size at the instant."""
    def narrow(
        self, *, epoch: int, selection: Sequence[tuple[int, int]], low: Sequence[tuple[int, int]] = ..., meta: bytes
    ) -> int:
        """Select less, and replace `low` and the opaque bytes, in one decision; return the bytes freed."""
    def delete_snapshot(self, *, epoch: int, force: bool = False) -> int:
        """Return the bytes freed."""
    def bookmark(self, *, epoch: int, meta: bytes) -> None: ...
    def delete_bookmark(self, *, epoch: int) -> None: ...
    def changed(self, *, since: int, until: int | None = None) -> Extents:
        """Blocks tracked by `since` that changed from its instant to that of `until`, or to now."""
    def newly_selected(self, *, since: int, until: int) -> Extents:
        """Blocks that `until` selects and `since` did not hold: an increment needs them whole."""
    def view(self, *, epoch: int, excluded_reads: Literal["zeros", "error"] = "zeros") -> View: ...
    def create_clone(self, *, epoch: int, meta: bytes) -> int:
        """Make a writable view on a snapshot; return its number. Durable on return."""
    def clones(self) -> list[CloneEntry]: ...
    def open_clone(self, *, number: int, excluded_reads: Literal["zeros", "error"] = "zeros") -> Clone:
        """Open a clone; one that is open already is the same one."""
    def reset_clone(self, *, number: int) -> int:
        """Let a clone that nobody has open be its snapshot again; return the bytes given back."""
    def delete_clone(self, *, number: int) -> int:
        """Remove a clone that nobody has open; return the bytes given back."""
    def set_clone_meta(self, *, number: int, meta: bytes) -> None: ...
    def restore(
        self, *, epoch: int, request: Sequence[tuple[int, int]], safety_selection: Sequence[tuple[int, int]],
        safety_low: Sequence[tuple[int, int]] = ...,
        meta: bytes, pause_limit_ms: int = 2000,
    ) -> RestoreStatus:
        """Start putting back the requested blocks that changed since `epoch`; the disk reads as restored at once."""
    def restore_plan(self, *, epoch: int, request: Sequence[tuple[int, int]]) -> Extents:
        """What `restore` would write now."""
    def restore_status(self) -> RestoreStatus | None: ...
    def restore_wait(self, *, timeout_ms: int) -> bool: ...
    def resize(self) -> int:
        """Take over the origin's present length; return the new size."""
    def statistics(self) -> Statistics: ...
    def set_store_policy(self, *, on_full: Literal["degrade", "hold", "fail"], limit_bytes: int) -> None:
        """Decide what happens to first changes when the store is full; in force and durable on return."""
    def store_usage(self) -> StoreUsage: ...
    def low(self, *, epoch: int) -> Extents:
        """What of a snapshot's selection is given up first."""
    def store_bytes(self) -> int:
        """Bytes kept for snapshots now: records and preserved content, not preallocated space."""
    def close(self) -> None:
        """Clean stop: everything on the origin, origin complete. The volume cannot be used afterwards."""

@final
class View:
    """A snapshot, readable. Holds the snapshot until closed. Thread-safe."""

    @property
    def epoch(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    def pread(self, *, offset: int, length: int) -> bytes: ...
    def extents(self, *, offset: int, length: int) -> list[tuple[int, int, int]]:
        """(start, end, flags): 1 hole, 2 reads as zeros, 4 not selected, 8 lost."""
    def close(self) -> None: ...

@final
class CloneEntry:
    """One clone the store has."""

    number: int
    epoch: int | None
    """The snapshot it began as; None if that cannot be read."""
    size_bytes: int
    created_unix_ns: int
    meta: bytes
    own_bytes: int
    """Bytes of the blocks that were written."""
    allocated_bytes: int
    """Bytes it takes in the store."""
    damage: str
    """Why it cannot be opened; empty if it can."""
    failure: str
    """Why it takes no more writes; empty if it does."""

@final
class Clone:
    """A writable view on a snapshot. Holds the snapshot until closed. Thread-safe."""

    @property
    def number(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    def pread(self, *, offset: int, length: int) -> bytes: ...
    def pwrite(self, data: bytes | bytearray | memoryview, *, offset: int, fua: bool = False) -> None: ...
    def write_zeroes(self, *, offset: int, length: int, may_punch: bool = True, fua: bool = False) -> None: ...
    def trim(self, *, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...
    def extents(self, *, offset: int, length: int) -> list[tuple[int, int, int]]:
        """(start, end, flags) as `View.extents`: what was written is neither unselected nor lost."""
    def close(self) -> None:
        """Make what was written durable, and close it for everybody who has it open here."""

ContextSpec = tuple[str, Literal["selected", "changed", "dirty"], int]
"""(name told to clients, what it shows, since which epoch; 0 for "selected")"""

@final
class Server:
    """The NBD server: listeners, connections, exports by name."""

    def __new__(cls, *, connections_max: int = 64) -> Self: ...
    def listen_unix(self, path: str) -> None: ...
    def listen_tcp(self, host: str, port: int) -> int: ...
    def add_volume(
        self, name: str, volume: Volume, *, description: str, contexts: Sequence[ContextSpec], read_only: bool = False
    ) -> None: ...
    def add_view(self, name: str, view: View, *, description: str, contexts: Sequence[ContextSpec]) -> None: ...
    def add_clone(
        self, name: str, clone: Clone, *, description: str, contexts: Sequence[ContextSpec], read_only: bool = False
    ) -> None: ...
    def set_contexts(self, name: str, contexts: Sequence[ContextSpec]) -> None: ...
    def set_default(self, name: str | None) -> None:
        """The export that the empty name means."""
    def remove(self, name: str, *, force: bool = False) -> int:
        """Withdraw an export; in use and not forced: NativeError("in_use"). Return the connections cut."""
    def connections(self) -> list[tuple[str, str, int]]:
        """(export, peer, seconds connected)"""
    def stop(self) -> None:
        """Finish what is in flight, close everything."""

FileSpec = tuple[str, Sequence[tuple[int, int]] | None]
"""(path of one or two names, half-open byte ranges of the export that make the file; None: all of it)"""

@final
class Images:
    """Exports of a server as files of a FUSE tree. Thread-safe."""

    def __new__(cls) -> Self: ...
    def add(
        self,
        name: str,
        server: Server,
        *,
        files: Sequence[FileSpec],
        access: Literal["constant", "watched", "writable"],
        created_unix_ns: int,
    ) -> None:
        """Show the export of that name as these files; all of them or none."""
    def extend(self, name: str, *, files: Sequence[FileSpec]) -> None:
        """Show more files of an export."""
    def remove(self, name: str, *, force: bool = False) -> int:
        """Take an export's files away; open and not forced: NativeError("in_use"). Return how often they were open."""
    def opens(self) -> dict[str, int]:
        """How often the files of each export are open."""
    def serve(self, device: int) -> ImageMount:
        """Answer for a mount on a descriptor of /dev/fuse, which is duplicated, until it is unmounted."""

@final
class ImageMount:
    """The threads that answer for one mount."""

    @property
    def is_over(self) -> bool:
        """Whether it was unmounted."""
