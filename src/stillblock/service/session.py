"""A session is a volume to work with, wherever it is open: here or in the process serving it."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Final, Self, TypeVar

from stillblock.errors import NarrowingError
from stillblock.operations.bookmarks import BookmarkList, BookmarkRequest, BookmarkTarget
from stillblock.operations.clones import (
    CloneChange,
    CloneChanged,
    CloneList,
    CloneRequest,
    CloneTarget,
)
from stillblock.operations.mounts import ImagesRequest, ImagesShown, MountSource, SourceRequest
from stillblock.operations.narrowing import (
    WAIT_MS_MAX,
    NarrowingProgress,
    WaitNarrowingRequest,
)
from stillblock.operations.promotion import (
    PromoteProgress,
    PromoteRequest,
    WaitPromotionRequest,
)
from stillblock.operations.recovery import Accepted, AcceptRequest
from stillblock.operations.restore import RestorePlan, RestoreRequest, WaitRequest
from stillblock.operations.snapshots import (
    ChangesRequest,
    Deleted,
    DeletePlan,
    DeleteRequest,
    ProtectRequest,
    RenameRequest,
    SnapshotList,
    SnapshotPlan,
    SnapshotRequest,
    SnapshotTarget,
)
from stillblock.operations.undecided import KeepRequest, Kept
from stillblock.operations.verification import (
    CheckReport,
    VerifyProgress,
    VerifyRequest,
    WaitVerifyRequest,
)
from stillblock.operations.volumes import ReleaseRequest, open_volume
from stillblock.service import verbs
from stillblock.service.verbs import NoRequest, Verb

if TYPE_CHECKING:
    from collections.abc import Callable

    from stillblock.config import Config
    from stillblock.model import (
        BookmarkInfo,
        Changes,
        CloneInfo,
        Receipt,
        RestoreProgress,
        SnapshotInfo,
        StoreUsage,
        VolumeInfo,
    )
    from stillblock.operations.consistency import ConsistencyRequest, StandingConsistency
    from stillblock.operations.forecast import Forecast
    from stillblock.operations.held import Readable
    from stillblock.operations.rules import Explanation, RulesRequest, StandingRules
    from stillblock.operations.statistics import ExportList, Statistics
    from stillblock.operations.usage import PolicyRequest
    from stillblock.operations.volume import EngineOptions, OpenVolume
    from stillblock.operations.volumes import Released, Resized

_TELL_MS: Final = 1000
Q = TypeVar("Q")
R = TypeVar("R")


class Session(abc.ABC):
    """The verbs on one volume; `call` is all that differs between the two kinds."""

    volume: str

    @abc.abstractmethod
    def call(self, verb: Verb[Q, R], request: Q) -> R:
        """Run a verb where the volume is open."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the session; what the volume needs to be complete happens first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    @abc.abstractmethod
    def is_remote(self) -> bool:
        """Whether another process serves the volume."""

    @abc.abstractmethod
    def open_disk(self, snapshot: SnapshotInfo, clone: CloneInfo | None = None) -> Readable:
        """Open a snapshot that is final, or a clone of it, for reading; it is held until closed."""

    # Volume

    def show_volume(self) -> VolumeInfo:
        """Return origin, store, size, rules and counts."""
        return self.call(verbs.SHOW_VOLUME, NoRequest())

    def statistics(self) -> Statistics:
        """Return the counters since the volume was opened."""
        return self.call(verbs.STATISTICS, NoRequest())

    def exports(self) -> ExportList:
        """Return what NBD clients can ask for."""
        return self.call(verbs.EXPORTS, NoRequest())

    def store_usage(self) -> StoreUsage:
        """Return how full the store is, and what happens when it is."""
        return self.call(verbs.STORE_USAGE, NoRequest())

    def set_store_policy(self, request: PolicyRequest) -> StoreUsage:
        """Change what happens when the store is full, or how much it may take."""
        return self.call(verbs.SET_STORE_POLICY, request)

    def consistency(self) -> StandingConsistency:
        """Return how snapshots are prepared if they do not say otherwise."""
        return self.call(verbs.SHOW_CONSISTENCY, NoRequest())

    def set_consistency(self, request: ConsistencyRequest) -> StandingConsistency:
        """Change how snapshots are prepared."""
        return self.call(verbs.SET_CONSISTENCY, request)

    def resize(self) -> Resized:
        """Take over the origin's present length."""
        return self.call(verbs.RESIZE, NoRequest())

    def release(self, *, force: bool = False) -> Released:
        """Stop cleanly, whoever serves the volume; raise `InUseError` if something is mounted."""
        return self.call(verbs.RELEASE, ReleaseRequest(force=force))

    # Health

    def accept_origin(self, *, note: str = "") -> Accepted:
        """Take an origin that others wrote to as it is."""
        return self.call(verbs.ACCEPT_ORIGIN, AcceptRequest(note=note))

    def keep_undecided(self, *, note: str = "") -> Kept:
        """Keep snapshots of which nobody can tell whether their groups exist."""
        return self.call(verbs.KEEP_UNDECIDED, KeepRequest(note=note))

    def check_structure(self) -> CheckReport:
        """Return what is wrong with the store, short of reading all content."""
        return self.call(verbs.CHECK_STRUCTURE, NoRequest())

    def start_verification(self, request: VerifyRequest) -> VerifyProgress:
        """Start to compare preserved content with its checksums."""
        return self.call(verbs.START_VERIFICATION, request)

    def verification_status(self) -> VerifyProgress:
        """Return how far the latest verification is."""
        return self.call(verbs.VERIFICATION_STATUS, NoRequest())

    def wait_verification(self, *, timeout_ms: int) -> VerifyProgress:
        """Wait, some seconds at most, until no verification runs."""
        return self.call(verbs.WAIT_VERIFICATION, WaitVerifyRequest(timeout_ms=timeout_ms))

    def cancel_verification(self) -> VerifyProgress:
        """Stop the verification that runs."""
        return self.call(verbs.CANCEL_VERIFICATION, NoRequest())

    # Rules

    def show_rules(self) -> StandingRules:
        """Return the standing rules."""
        return self.call(verbs.SHOW_RULES, NoRequest())

    def set_rules(self, request: RulesRequest) -> StandingRules:
        """Replace the standing rules."""
        return self.call(verbs.SET_RULES, request)

    def add_rules(self, request: RulesRequest) -> StandingRules:
        """Append to the standing rules."""
        return self.call(verbs.ADD_RULES, request)

    def explain(self, request: RulesRequest) -> Explanation:
        """Return what rules come to on the disk now."""
        return self.call(verbs.EXPLAIN, request)

    def forecast(self) -> Forecast:
        """Return what excluding each directory, free space and swap would save a day."""
        return self.call(verbs.FORECAST, NoRequest())

    # Snapshots

    def list_snapshots(self) -> SnapshotList:
        """Return every snapshot, oldest first."""
        return self.call(verbs.LIST_SNAPSHOTS, NoRequest())

    def plan_snapshot(self, request: SnapshotRequest) -> SnapshotPlan:
        """Return what a snapshot would hold if it were taken now."""
        return self.call(verbs.PLAN_SNAPSHOT, request)

    def create_snapshot(self, request: SnapshotRequest, *, wait: bool = True) -> Receipt:
        """Take a snapshot; with `wait` its selection is final when this returns.

        Raise `NarrowingError` if it cannot become so now; the snapshot is there, and the next
        opening of the volume tries again.
        """
        receipt = self.call(verbs.CREATE_SNAPSHOT, request)
        return self.wait_final(receipt) if wait else receipt

    def wait_final(
        self, receipt: Receipt, *, told: Callable[[NarrowingProgress], None] | None = None
    ) -> Receipt:
        """Return the receipt of a snapshot once its selection is final.

        `told` hears every second how far it is.
        """
        info = receipt.snapshot
        if info.is_final:
            return receipt
        timeout_ms = WAIT_MS_MAX if told is None else _TELL_MS
        while not (progress := self.wait_narrowing(info.id, timeout_ms=timeout_ms)).is_final:
            if told is not None:
                told(progress)
            if not progress.is_running:
                raise NarrowingError(
                    f"{info.reference} is taken, but not narrowed: {progress.failure}",
                    hint="it holds more than its rules say; opening the volume anew tries again",
                )
        return self.receipt(info.id)

    def wait_narrowing(self, snapshot: str, *, timeout_ms: int = WAIT_MS_MAX) -> NarrowingProgress:
        """Wait, some seconds at most, until a snapshot's selection is final."""
        request = WaitNarrowingRequest(snapshot=snapshot, timeout_ms=timeout_ms)
        return self.call(verbs.WAIT_NARROWING, request)

    def show_snapshot(self, snapshot: str) -> SnapshotInfo:
        """Return one snapshot."""
        return self.call(verbs.SHOW_SNAPSHOT, SnapshotTarget(snapshot=snapshot))

    def receipt(self, snapshot: str) -> Receipt:
        """Return the record of a snapshot."""
        return self.call(verbs.RECEIPT, SnapshotTarget(snapshot=snapshot))

    def rename_snapshot(self, snapshot: str, *, name: str) -> SnapshotInfo:
        """Give a snapshot another name."""
        return self.call(verbs.RENAME_SNAPSHOT, RenameRequest(snapshot=snapshot, name=name))

    def protect_snapshot(self, snapshot: str, *, is_protected: bool = True) -> SnapshotInfo:
        """Refuse deletion, or allow it again."""
        return self.call(
            verbs.PROTECT_SNAPSHOT, ProtectRequest(snapshot=snapshot, is_protected=is_protected)
        )

    def plan_delete(self, snapshot: str) -> DeletePlan:
        """Return what deleting a snapshot would free."""
        return self.call(verbs.PLAN_DELETE, SnapshotTarget(snapshot=snapshot))

    def delete_snapshot(self, snapshot: str, *, force: bool = False) -> Deleted:
        """Delete a snapshot."""
        return self.call(verbs.DELETE_SNAPSHOT, DeleteRequest(snapshot=snapshot, force=force))

    def changes(self, *, since: str, until: str | None = None) -> Changes:
        """Return what changed since one instant until another, or until now."""
        return self.call(verbs.CHANGES, ChangesRequest(since=since, until=until))

    # Bookmarks

    def list_bookmarks(self) -> BookmarkList:
        """Return every bookmark, oldest first."""
        return self.call(verbs.LIST_BOOKMARKS, NoRequest())

    def create_bookmark(self, snapshot: str, *, name: str | None = None) -> BookmarkInfo:
        """Track what changes after a snapshot, also once it is deleted."""
        return self.call(verbs.CREATE_BOOKMARK, BookmarkRequest(snapshot=snapshot, name=name))

    def show_bookmark(self, bookmark: str) -> BookmarkInfo:
        """Return one bookmark."""
        return self.call(verbs.SHOW_BOOKMARK, BookmarkTarget(bookmark=bookmark))

    def delete_bookmark(self, bookmark: str) -> BookmarkInfo:
        """Stop tracking since a bookmark."""
        return self.call(verbs.DELETE_BOOKMARK, BookmarkTarget(bookmark=bookmark))

    # Clones

    def list_clones(self) -> CloneList:
        """Return every clone of the volume."""
        return self.call(verbs.LIST_CLONES, NoRequest())

    def create_clone(self, request: CloneRequest) -> CloneInfo:
        """Make a writable view on a snapshot."""
        return self.call(verbs.CREATE_CLONE, request)

    def show_clone(self, snapshot: str, clone: str) -> CloneInfo:
        """Return one clone."""
        return self.call(verbs.SHOW_CLONE, CloneTarget(snapshot=snapshot, clone=clone))

    def reset_clone(self, snapshot: str, clone: str, *, force: bool = False) -> CloneChanged:
        """Forget what was written to a clone."""
        request = CloneChange(snapshot=snapshot, clone=clone, force=force)
        return self.call(verbs.RESET_CLONE, request)

    def delete_clone(self, snapshot: str, clone: str, *, force: bool = False) -> CloneChanged:
        """Delete a clone and what was written to it."""
        request = CloneChange(snapshot=snapshot, clone=clone, force=force)
        return self.call(verbs.DELETE_CLONE, request)

    def start_promotion(self, request: PromoteRequest) -> PromoteProgress:
        """Start to copy a clone to a new raw image."""
        return self.call(verbs.START_PROMOTION, request)

    def wait_promotion(self, *, timeout_ms: int) -> PromoteProgress:
        """Wait, some seconds at most, until no clone is being copied."""
        return self.call(verbs.WAIT_PROMOTION, WaitPromotionRequest(timeout_ms=timeout_ms))

    def cancel_promotion(self) -> PromoteProgress:
        """Stop copying a clone; nothing is left of the image."""
        return self.call(verbs.CANCEL_PROMOTION, NoRequest())

    # Mounts

    def show_images(self, directory: str) -> ImagesShown:
        """Show images of everything there is as files in a directory."""
        return self.call(verbs.SHOW_IMAGES, ImagesRequest(directory=directory))

    def mount_source(self, request: SourceRequest) -> MountSource:
        """Return the file to mount or attach, shown in a tree of the server's own."""
        return self.call(verbs.MOUNT_SOURCE, request)

    # Restore

    def plan_restore(self, request: RestoreRequest) -> RestorePlan:
        """Return what a restore would write now, by partition."""
        return self.call(verbs.PLAN_RESTORE, request)

    def start_restore(self, request: RestoreRequest) -> RestoreProgress:
        """Start a restore; the disk reads as restored at once."""
        return self.call(verbs.START_RESTORE, request)

    def restore_status(self) -> RestoreProgress:
        """Return how far a restore is."""
        return self.call(verbs.RESTORE_STATUS, NoRequest())

    def wait_restore(self, *, timeout_ms: int) -> RestoreProgress:
        """Wait, some seconds at most, until no restore runs."""
        return self.call(verbs.WAIT_RESTORE, WaitRequest(timeout_ms=timeout_ms))


class LocalSession(Session):
    """A volume that nobody serves, open in this process for as long as the session lasts."""

    def __init__(self, opened: OpenVolume) -> None:
        self.volume = opened.name
        self._opened = opened

    def call(self, verb: Verb[Q, R], request: Q) -> R:
        """Run a verb here."""
        return verb.run(self._opened, request)

    def __exit__(self, *details: object) -> None:
        if details[:1] == (None,):
            # Nobody else would. Broken off, it begins anew at the next opening.
            self._opened.narrowings.finish()
        self.close()

    def close(self) -> None:
        """Stop the volume cleanly."""
        self._opened.close()

    def open_disk(self, snapshot: SnapshotInfo, clone: CloneInfo | None = None) -> Readable:
        """Open a view of it in this process."""
        if clone is not None:
            return self._opened.engine.open_clone(number=clone.number)
        return self._opened.engine.view(epoch=snapshot.epoch)

    @property
    def opened(self) -> OpenVolume:
        """The volume itself."""
        return self._opened

    @property
    def is_remote(self) -> bool:
        """False: it is here."""
        return False


def open_session(config: Config, name: str, options: EngineOptions | None = None) -> Session:
    """Return a session on the volume: with the process that serves it, else in this one."""
    from stillblock.service.client import RemoteSession, find_server  # noqa: PLC0415 - a cycle

    socket_path = find_server(config, name)
    if socket_path is not None:
        return RemoteSession(socket_path, name)
    return LocalSession(open_volume(config, name, options))
