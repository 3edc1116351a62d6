"""One class for each situation that can go wrong: exit code, stable code, blame, retry or not.

Messages say what, where, how much and what now. Whose fault it is tells where to look: `USER` asked
for something impossible, `PEER` (another process or client) got in the way, `DISK` failed
underneath, `US` is a defect in stillblock.
"""

from __future__ import annotations

import enum
from typing import ClassVar, Final


class ExitCode(enum.IntEnum):
    """What the process returns to the shell; documented in docs/cli.md."""

    OK = 0
    FAILED = 1
    USAGE = 2
    PARTIAL = 3
    DAMAGE = 4
    NO_REPOSITORY = 10
    LOCKED = 11
    KEY = 12
    SNAPSHOT_LOST = 13
    INTERRUPTED = 130


class Blame(enum.StrEnum):
    """Who has to act on an error."""

    USER = "user"
    PEER = "peer"
    DISK = "disk"
    US = "us"


class StillblockError(Exception):
    """Base of all errors that stillblock raises on purpose.

    `code` is stable across releases and is what JSON output and the control API carry.
    """

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[ExitCode] = ExitCode.FAILED
    blame: ClassVar[Blame] = Blame.US
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Keep the message, and the advice on what to do now, if the message does not hold it."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def to_json(self) -> dict[str, object]:
        """Return what JSON output and the control API say about this error."""
        return {
            "code": self.code,
            "message": str(self),
            "blame": str(self.blame),
            "is_retryable": self.is_retryable,
            "exit_code": int(self.exit_code),
        }


# You did it wrong -------------------------------------------------------------------------------


class UsageError(StillblockError):
    """The request itself makes no sense: an unknown option, a malformed size, a bad name."""

    code = "usage"
    exit_code = ExitCode.USAGE
    blame = Blame.USER


class RuleError(UsageError):
    """A rule term is malformed or means nothing on this disk; the message names the term."""

    code = "rule"


class ConfirmationNeededError(UsageError):
    """A destructive request was made without a terminal to ask on and without `--yes`."""

    code = "confirmation_needed"


class NotFoundError(StillblockError):
    """No volume, snapshot or bookmark of that name."""

    code = "not_found"
    blame = Blame.USER


class NotServedError(StillblockError):
    """It needs a process that serves the volume, and there is none."""

    code = "not_served"
    blame = Blame.USER


class NameTakenError(StillblockError):
    """Another snapshot, bookmark or volume has the name already."""

    code = "name_taken"
    blame = Blame.USER


class ProtectedError(StillblockError):
    """The snapshot is protected from deletion."""

    code = "protected"
    blame = Blame.USER


class CancelledError(StillblockError):
    """The user answered no."""

    code = "cancelled"
    blame = Blame.USER


class RefusedError(StillblockError):
    """The request is understood and would be harmful here."""

    code = "refused"
    blame = Blame.USER


class ImageNotRawError(RefusedError):
    """The origin is an image in a format of its own, not a raw disk."""

    code = "image_not_raw"


class OriginTakenError(RefusedError):
    """The origin is, holds or lies on the origin of another volume."""

    code = "origin_taken"


class OriginMountedError(RefusedError):
    """The origin is mounted, used as swap or held by another kernel driver."""

    code = "origin_mounted"


class StoreOnVolumeError(RefusedError):
    """The store or the state directory would lie on the volume itself."""

    code = "store_on_volume"


class FreezeRefusedError(RefusedError):
    """Freezing what was asked for would do harm, or nothing for this volume."""

    code = "freeze_refused"


class StoreNotEmptyError(RefusedError):
    """The directory meant for a new store holds something."""

    code = "store_not_empty"


class ExcludedError(StillblockError):
    """The bytes asked for are not part of the snapshot."""

    code = "excluded"
    blame = Blame.USER


class UnsupportedVersionError(StillblockError):
    """Written by a newer stillblock than this one."""

    code = "unsupported_version"
    blame = Blame.USER


class ClosedError(StillblockError):
    """The volume, view or session was closed already."""

    code = "closed"
    blame = Blame.USER


class SocketPathError(StillblockError):
    """A path is too long for a Unix socket."""

    code = "socket_path"
    blame = Blame.USER


# Another process or client did ------------------------------------------------------------------


class LockedError(StillblockError):
    """Another process has the volume open."""

    code = "locked"
    exit_code = ExitCode.LOCKED
    blame = Blame.PEER
    is_retryable = True


class InUseError(StillblockError):
    """Clients, views or restores hold the thing that should go away."""

    code = "in_use"
    blame = Blame.PEER
    is_retryable = True


class RestoreRunningError(StillblockError):
    """A restore is running on the volume and has to end first."""

    code = "restore_running"
    blame = Blame.PEER
    is_retryable = True


class NarrowingError(StillblockError):
    """The snapshot's selection is not final yet; it is in some seconds."""

    code = "narrowing"
    blame = Blame.PEER
    is_retryable = True


class OriginChangedError(StillblockError):
    """The origin was written, replaced or resized by something else."""

    code = "origin_changed"
    blame = Blame.PEER


class RecoveryNeededError(StillblockError):
    """The last server was killed and left acknowledged writes that somebody has to decide about."""

    code = "recovery_needed"
    blame = Blame.PEER


class UndecidedError(StillblockError):
    """Whether a snapshot of a group exists is decided in the store of a volume that is not here."""

    code = "undecided"
    blame = Blame.PEER


class NotQuietError(StillblockError):
    """Writes came all the time while a quiet moment was waited for; nothing was taken."""

    code = "not_quiet"
    blame = Blame.PEER
    is_retryable = True


class QuiesceError(StillblockError):
    """A filesystem, guest or application could not be quiesced; nothing was taken."""

    code = "quiesce"
    blame = Blame.PEER


class FuseError(StillblockError):
    """Files cannot be shown by FUSE here."""

    code = "fuse"
    blame = Blame.PEER


class MountError(StillblockError):
    """The kernel or a command of the system did not mount, unmount, attach or detach."""

    code = "mount"
    blame = Blame.PEER


class ControlError(StillblockError):
    """The serve process did not answer, or with something that is not ours."""

    code = "control"
    blame = Blame.PEER
    is_retryable = True


# The disk did -----------------------------------------------------------------------------------


class OriginIOError(StillblockError):
    """Reading, writing or syncing the origin failed."""

    code = "origin_io"
    blame = Blame.DISK


class StoreIOError(StillblockError):
    """Reading, writing or syncing the store failed."""

    code = "store_io"
    blame = Blame.DISK


class StoreDamagedError(StillblockError):
    """The store holds bytes that fail their checksums."""

    code = "store_damaged"
    exit_code = ExitCode.DAMAGE
    blame = Blame.DISK


class StoreFullError(StillblockError):
    """No room is left in the store."""

    code = "store_full"
    blame = Blame.DISK


class SnapshotLostError(StillblockError):
    """The snapshot is incomplete: originals could not be kept."""

    code = "snapshot_lost"
    exit_code = ExitCode.SNAPSHOT_LOST
    blame = Blame.DISK


class PauseTimeoutError(StillblockError):
    """Writes in flight did not finish within the pause limit; nothing was taken, writes go on."""

    code = "pause_timeout"
    blame = Blame.DISK
    is_retryable = True


class CatalogError(StillblockError):
    """The catalog in the state directory cannot be read or written."""

    code = "catalog"
    blame = Blame.DISK


class StateError(StillblockError):
    """The state or run directory cannot be made or used."""

    code = "state"
    blame = Blame.DISK


# We did -----------------------------------------------------------------------------------------


class InternalError(StillblockError):
    """A defect in stillblock."""

    code = "internal"


_NATIVE_KINDS: Final[dict[str, type[StillblockError]]] = {
    "usage": UsageError,
    "locked": LockedError,
    "origin_io": OriginIOError,
    "origin_changed": OriginChangedError,
    "store_io": StoreIOError,
    "store_damaged": StoreDamagedError,
    "store_full": StoreFullError,
    "unsupported_version": UnsupportedVersionError,
    "not_found": NotFoundError,
    "in_use": InUseError,
    "undecided": UndecidedError,
    "pause_timeout": PauseTimeoutError,
    "snapshot_lost": SnapshotLostError,
    "excluded": ExcludedError,
    "recovery_needed": RecoveryNeededError,
    "restore_running": RestoreRunningError,
    "not_quiet": NotQuietError,
    "quiesce": QuiesceError,
    "closed": ClosedError,
    "fuse": FuseError,
    "internal": InternalError,
}


def from_native(kind: str, message: str) -> StillblockError:
    """Return the error for one kind that the Rust core reports; an unknown kind is our defect."""
    error_class = _NATIVE_KINDS.get(kind)
    if error_class is not None:
        return error_class(message)
    return InternalError(f"the engine reported an unknown kind of error, {kind!r}: {message}")


def native_kinds() -> frozenset[str]:
    """Return every kind that `from_native` knows."""
    return frozenset(_NATIVE_KINDS)


def by_code() -> dict[str, type[StillblockError]]:
    """Return every error class by its stable code, subclasses included."""
    found: dict[str, type[StillblockError]] = {}
    waiting: list[type[StillblockError]] = [StillblockError]
    while waiting:
        error_class = waiting.pop()
        found.setdefault(error_class.code, error_class)
        waiting.extend(error_class.__subclasses__())
    return found


def _unknown_class(document: dict[str, object]) -> type[StillblockError]:
    """Return a class for a code of a newer server, as severe as the server says."""
    exit_code, blame = document.get("exit_code"), document.get("blame")
    return type(
        "ReportedError",
        (StillblockError,),
        {
            "code": document["code"],
            "exit_code": next((c for c in ExitCode if c == exit_code), ExitCode.FAILED),
            "blame": next((b for b in Blame if b == blame), Blame.PEER),
            "is_retryable": document.get("is_retryable") is True,
        },
    )


def from_json(document: object) -> StillblockError:
    """Rebuild the error that a serve process reported; what is not one is a `ControlError`."""
    if isinstance(document, dict):
        code, message = document.get("code"), document.get("message")
        if isinstance(code, str) and isinstance(message, str):
            return (by_code().get(code) or _unknown_class(document))(message)
    return ControlError(f"the serve process reported an error we cannot read: {document!r:.200}")
