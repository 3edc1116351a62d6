"""The table of verbs on a volume: once here for the HTTP routes, the client and the index.

A verb takes one frozen request and returns one frozen result, in whichever process the volume is
open. Fields of the request that the path names travel in it; the rest in the query of a GET or
DELETE, or as the JSON body.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

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
from stillblock.operations import (
    bookmarks,
    clones,
    consistency,
    explaining,
    forecast,
    mounts,
    narrowing,
    promotion,
    recovery,
    restore,
    rules,
    snapshots,
    statistics,
    undecided,
    usage,
    verification,
    volumes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from stillblock.operations.volume import OpenVolume

Q = TypeVar("Q")
R = TypeVar("R")

GROUPS_PATH: Final = "/v1/groups"
"""POST takes snapshots of several volumes, all served here, at one instant."""
PLAN_GROUP_PATH: Final = "/v1/plans/group"

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRequest:
    """A verb that needs nothing but the volume."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb(Generic[Q, R]):
    """One verb on a volume."""

    name: str
    method: Method
    path: str
    """Below `/v1/volumes/{volume}`."""
    summary: str
    request: type[Q]
    result: type[R]
    run: Callable[[OpenVolume, Q], R]


SHOW_VOLUME: Final = Verb(
    name="show_volume",
    method="GET",
    path="",
    summary="The volume: origin, store, size, rules, how many snapshots.",
    request=NoRequest,
    result=VolumeInfo,
    run=lambda volume, _: volume.info(),
)
STATISTICS: Final = Verb(
    name="statistics",
    method="GET",
    path="/statistics",
    summary="Counters since the volume was opened.",
    request=NoRequest,
    result=statistics.Statistics,
    run=lambda volume, _: statistics.read_statistics(volume),
)
EXPORTS: Final = Verb(
    name="exports",
    method="GET",
    path="/exports",
    summary="What NBD clients can ask for.",
    request=NoRequest,
    result=statistics.ExportList,
    run=lambda volume, _: statistics.list_exports(volume),
)
STORE_USAGE: Final = Verb(
    name="store_usage",
    method="GET",
    path="/store",
    summary="How full the store is, and what happens when it is.",
    request=NoRequest,
    result=StoreUsage,
    run=lambda volume, _: usage.store_usage(volume),
)
SET_STORE_POLICY: Final = Verb(
    name="set_store_policy",
    method="PATCH",
    path="/store",
    summary="Change what happens when the store is full, or how much it may take.",
    request=usage.PolicyRequest,
    result=StoreUsage,
    run=usage.set_policy,
)
SHOW_CONSISTENCY: Final = Verb(
    name="show_consistency",
    method="GET",
    path="/consistency",
    summary="How snapshots are prepared if they do not say otherwise.",
    request=NoRequest,
    result=consistency.StandingConsistency,
    run=lambda volume, _: consistency.show_consistency(volume),
)
SET_CONSISTENCY: Final = Verb(
    name="set_consistency",
    method="PATCH",
    path="/consistency",
    summary="Change how snapshots are prepared.",
    request=consistency.ConsistencyRequest,
    result=consistency.StandingConsistency,
    run=consistency.set_consistency,
)
RESIZE: Final = Verb(
    name="resize",
    method="POST",
    path="/resize",
    summary="Take over the origin's present length.",
    request=NoRequest,
    result=volumes.Resized,
    run=lambda volume, _: volumes.resize_volume(volume),
)
RELEASE: Final = Verb(
    name="release",
    method="POST",
    path="/release",
    summary="Stop cleanly; the origin is complete afterwards.",
    request=volumes.ReleaseRequest,
    result=volumes.Released,
    run=volumes.release_volume,
)
ACCEPT_ORIGIN: Final = Verb(
    name="accept_origin",
    method="POST",
    path="/accept-origin",
    summary="Take an origin that others wrote to as it is.",
    request=recovery.AcceptRequest,
    result=recovery.Accepted,
    run=recovery.accept_origin,
)
KEEP_UNDECIDED: Final = Verb(
    name="keep_undecided",
    method="POST",
    path="/keep-undecided",
    summary="Keep snapshots of which nobody can tell whether their groups exist.",
    request=undecided.KeepRequest,
    result=undecided.Kept,
    run=undecided.keep_undecided,
)
CHECK_STRUCTURE: Final = Verb(
    name="check_structure",
    method="POST",
    path="/check",
    summary="What is wrong with the store, short of reading all content.",
    request=NoRequest,
    result=verification.CheckReport,
    run=lambda volume, _: verification.check_structure(volume),
)
START_VERIFICATION: Final = Verb(
    name="start_verification",
    method="POST",
    path="/verification",
    summary="Start to compare preserved content with its checksums.",
    request=verification.VerifyRequest,
    result=verification.VerifyProgress,
    run=verification.start_verification,
)
VERIFICATION_STATUS: Final = Verb(
    name="verification_status",
    method="GET",
    path="/verification",
    summary="How far the latest verification is.",
    request=NoRequest,
    result=verification.VerifyProgress,
    run=lambda volume, _: verification.verification_status(volume),
)
WAIT_VERIFICATION: Final = Verb(
    name="wait_verification",
    method="GET",
    path="/verification/wait",
    summary="Wait, some seconds at most, until no verification runs.",
    request=verification.WaitVerifyRequest,
    result=verification.VerifyProgress,
    run=verification.wait_verification,
)
CANCEL_VERIFICATION: Final = Verb(
    name="cancel_verification",
    method="DELETE",
    path="/verification",
    summary="Stop the verification that runs.",
    request=NoRequest,
    result=verification.VerifyProgress,
    run=lambda volume, _: verification.cancel_verification(volume),
)
SHOW_RULES: Final = Verb(
    name="show_rules",
    method="GET",
    path="/rules",
    summary="The standing rules.",
    request=NoRequest,
    result=rules.StandingRules,
    run=lambda volume, _: rules.show_rules(volume),
)
SET_RULES: Final = Verb(
    name="set_rules",
    method="PUT",
    path="/rules",
    summary="Replace the standing rules.",
    request=rules.RulesRequest,
    result=rules.StandingRules,
    run=rules.set_rules,
)
ADD_RULES: Final = Verb(
    name="add_rules",
    method="POST",
    path="/rules",
    summary="Append to the standing rules.",
    request=rules.RulesRequest,
    result=rules.StandingRules,
    run=rules.add_rules,
)
EXPLAIN: Final = Verb(
    name="explain",
    method="POST",
    path="/rules/explain",
    summary="What rules come to on the disk now.",
    request=rules.RulesRequest,
    result=rules.Explanation,
    run=explaining.explain,
)
FORECAST: Final = Verb(
    name="forecast",
    method="POST",
    path="/rules/forecast",
    summary="What excluding each directory, free space and swap would save a day.",
    request=NoRequest,
    result=forecast.Forecast,
    run=lambda volume, _: forecast.forecast(volume),
)
LIST_SNAPSHOTS: Final = Verb(
    name="list_snapshots",
    method="GET",
    path="/snapshots",
    summary="Every snapshot, oldest first.",
    request=NoRequest,
    result=snapshots.SnapshotList,
    run=lambda volume, _: snapshots.list_snapshots(volume),
)
CREATE_SNAPSHOT: Final = Verb(
    name="create_snapshot",
    method="POST",
    path="/snapshots",
    summary="Take a snapshot; what its rules say of files is resolved afterwards.",
    request=snapshots.SnapshotRequest,
    result=Receipt,
    run=snapshots.create_snapshot,
)
WAIT_NARROWING: Final = Verb(
    name="wait_narrowing",
    method="GET",
    path="/snapshots/{snapshot}/narrowing",
    summary="Wait, some seconds at most, until a snapshot's selection is final.",
    request=narrowing.WaitNarrowingRequest,
    result=narrowing.NarrowingProgress,
    run=narrowing.wait_narrowing,
)
PLAN_SNAPSHOT: Final = Verb(
    name="plan_snapshot",
    method="POST",
    path="/plans/snapshot",
    summary="What a snapshot would hold if it were taken now.",
    request=snapshots.SnapshotRequest,
    result=snapshots.SnapshotPlan,
    run=snapshots.plan_snapshot,
)
SHOW_SNAPSHOT: Final = Verb(
    name="show_snapshot",
    method="GET",
    path="/snapshots/{snapshot}",
    summary="One snapshot.",
    request=snapshots.SnapshotTarget,
    result=SnapshotInfo,
    run=snapshots.show_snapshot,
)
RECEIPT: Final = Verb(
    name="receipt",
    method="GET",
    path="/snapshots/{snapshot}/receipt",
    summary="Rules, resolved extents, what was left out and why, how consistent, when.",
    request=snapshots.SnapshotTarget,
    result=Receipt,
    run=snapshots.read_receipt,
)
RENAME_SNAPSHOT: Final = Verb(
    name="rename_snapshot",
    method="POST",
    path="/snapshots/{snapshot}/rename",
    summary="Give a snapshot another name.",
    request=snapshots.RenameRequest,
    result=SnapshotInfo,
    run=snapshots.rename_snapshot,
)
PROTECT_SNAPSHOT: Final = Verb(
    name="protect_snapshot",
    method="POST",
    path="/snapshots/{snapshot}/protect",
    summary="Refuse deletion, or allow it again.",
    request=snapshots.ProtectRequest,
    result=SnapshotInfo,
    run=snapshots.protect_snapshot,
)
PLAN_DELETE: Final = Verb(
    name="plan_delete",
    method="GET",
    path="/plans/delete/{snapshot}",
    summary="What deleting a snapshot would free.",
    request=snapshots.SnapshotTarget,
    result=snapshots.DeletePlan,
    run=snapshots.plan_delete,
)
DELETE_SNAPSHOT: Final = Verb(
    name="delete_snapshot",
    method="DELETE",
    path="/snapshots/{snapshot}",
    summary="Delete a snapshot.",
    request=snapshots.DeleteRequest,
    result=snapshots.Deleted,
    run=snapshots.delete_snapshot,
)
CHANGES: Final = Verb(
    name="changes",
    method="GET",
    path="/changes",
    summary="What changed since one instant until another, or until now.",
    request=snapshots.ChangesRequest,
    result=Changes,
    run=snapshots.changes,
)
LIST_BOOKMARKS: Final = Verb(
    name="list_bookmarks",
    method="GET",
    path="/bookmarks",
    summary="Every bookmark, oldest first.",
    request=NoRequest,
    result=bookmarks.BookmarkList,
    run=lambda volume, _: bookmarks.list_bookmarks(volume),
)
CREATE_BOOKMARK: Final = Verb(
    name="create_bookmark",
    method="POST",
    path="/bookmarks",
    summary="Track what changes after a snapshot, also once it is deleted.",
    request=bookmarks.BookmarkRequest,
    result=BookmarkInfo,
    run=bookmarks.create_bookmark,
)
SHOW_BOOKMARK: Final = Verb(
    name="show_bookmark",
    method="GET",
    path="/bookmarks/{bookmark}",
    summary="One bookmark.",
    request=bookmarks.BookmarkTarget,
    result=BookmarkInfo,
    run=bookmarks.show_bookmark,
)
DELETE_BOOKMARK: Final = Verb(
    name="delete_bookmark",
    method="DELETE",
    path="/bookmarks/{bookmark}",
    summary="Stop tracking since a bookmark.",
    request=bookmarks.BookmarkTarget,
    result=BookmarkInfo,
    run=bookmarks.delete_bookmark,
)
LIST_CLONES: Final = Verb(
    name="list_clones",
    method="GET",
    path="/clones",
    summary="Every clone, oldest first, and what they take.",
    request=NoRequest,
    result=clones.CloneList,
    run=lambda volume, _: clones.list_clones(volume),
)
CREATE_CLONE: Final = Verb(
    name="create_clone",
    method="POST",
    path="/snapshots/{snapshot}/clones",
    summary="Make a writable view on a snapshot.",
    request=clones.CloneRequest,
    result=CloneInfo,
    run=clones.create_clone,
)
SHOW_CLONE: Final = Verb(
    name="show_clone",
    method="GET",
    path="/snapshots/{snapshot}/clones/{clone}",
    summary="One clone.",
    request=clones.CloneTarget,
    result=CloneInfo,
    run=clones.show_clone,
)
RESET_CLONE: Final = Verb(
    name="reset_clone",
    method="POST",
    path="/snapshots/{snapshot}/clones/{clone}/reset",
    summary="Forget what was written to a clone.",
    request=clones.CloneChange,
    result=clones.CloneChanged,
    run=clones.reset_clone,
)
DELETE_CLONE: Final = Verb(
    name="delete_clone",
    method="DELETE",
    path="/snapshots/{snapshot}/clones/{clone}",
    summary="Delete a clone and what was written to it.",
    request=clones.CloneChange,
    result=clones.CloneChanged,
    run=clones.delete_clone,
)
START_PROMOTION: Final = Verb(
    name="start_promotion",
    method="POST",
    path="/snapshots/{snapshot}/clones/{clone}/promotion",
    summary="Start to copy a clone to a new raw image.",
    request=promotion.PromoteRequest,
    result=promotion.PromoteProgress,
    run=promotion.start_promotion,
)
WAIT_PROMOTION: Final = Verb(
    name="wait_promotion",
    method="GET",
    path="/promotion/wait",
    summary="Wait, some seconds at most, until no clone is being copied.",
    request=promotion.WaitPromotionRequest,
    result=promotion.PromoteProgress,
    run=promotion.wait_promotion,
)
CANCEL_PROMOTION: Final = Verb(
    name="cancel_promotion",
    method="DELETE",
    path="/promotion",
    summary="Stop copying a clone; nothing is left of the image.",
    request=NoRequest,
    result=promotion.PromoteProgress,
    run=lambda volume, _: promotion.cancel_promotion(volume),
)
SHOW_IMAGES: Final = Verb(
    name="show_images",
    method="POST",
    path="/images",
    summary="Show every snapshot and clone as a file in a directory.",
    request=mounts.ImagesRequest,
    result=mounts.ImagesShown,
    run=mounts.show_images,
)
MOUNT_SOURCE: Final = Verb(
    name="mount_source",
    method="POST",
    path="/mount-source",
    summary="The file to mount or attach for a snapshot, clone or partition of one.",
    request=mounts.SourceRequest,
    result=mounts.MountSource,
    run=mounts.mount_source,
)
PLAN_RESTORE: Final = Verb(
    name="plan_restore",
    method="POST",
    path="/plans/restore",
    summary="What a restore would write now, by partition.",
    request=restore.RestoreRequest,
    result=restore.RestorePlan,
    run=restore.plan_restore,
)
START_RESTORE: Final = Verb(
    name="start_restore",
    method="POST",
    path="/restore",
    summary="Start a restore; the disk reads as restored at once.",
    request=restore.RestoreRequest,
    result=RestoreProgress,
    run=restore.start_restore,
)
RESTORE_STATUS: Final = Verb(
    name="restore_status",
    method="GET",
    path="/restore",
    summary="How far a restore is.",
    request=NoRequest,
    result=RestoreProgress,
    run=lambda volume, _: restore.restore_status(volume),
)
WAIT_RESTORE: Final = Verb(
    name="wait_restore",
    method="GET",
    path="/restore/wait",
    summary="Wait, some seconds at most, until no restore runs.",
    request=restore.WaitRequest,
    result=RestoreProgress,
    run=restore.wait_restore,
)


def all_verbs() -> tuple[Verb[Any, Any], ...]:
    """Return every verb, in the order of this file."""
    return tuple(value for value in globals().values() if isinstance(value, Verb))
