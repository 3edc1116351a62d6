"""What is mounted, written down before it is: one file a mount in the state directory.

`mounts/VOLUME@ID.json`; `mounts/lock` is held by whoever makes or undoes a mount, so that nobody
takes what is being made for what was left over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock import codec
from stillblock.errors import InUseError, StateError, StillblockError
from stillblock.model import Extents

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK_S: Final = 60.0
"""How long to wait for somebody else's mount: a slow disk may take long to replay a journal."""
_POLL_S: Final = 0.05
_KIND: Final = "mount"
_LOG: Final = logging.getLogger("stillblock.mounting")


class MountKind(StrEnum):
    """What was mounted."""

    IMAGES = "images"
    """Images as files in a directory."""
    FILESYSTEM = "filesystem"
    """A filesystem of a snapshot or clone, in a directory."""
    DEVICE = "device"
    """A snapshot, clone or live disk as a block device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MountRecord:
    """One mount, as far as it was made."""

    id: str
    volume: str
    what: MountKind
    reference: str
    """What is shown: `web`, `web@monday`, `web@monday+x`."""
    directory: str = ""
    """Where, unless it is a device."""
    image: str = ""
    """The file that a loop device is to lie on; empty: none."""
    device: str = ""
    """The block device, once there is one."""
    device_sequence: int = 0
    """The kernel's number of what is attached to it, by which it is known again; 0: none."""
    boot_id: str = ""
    """The start of the machine that it was made in."""
    is_held: bool = False
    """Whether its end was tried, and somebody still used it."""
    device_pid: int | None = None
    """Of a kernel NBD device: who connected it, as the kernel tells."""
    filesystem: str = ""
    is_read_only: bool = True
    is_private: bool = False
    """Of images: shown for other mounts only, and gone with the last of them."""
    pieces: Extents = ()
    """Which ranges of the disk it is, (start, end) in bytes; empty: all of it."""
    clone: str = ""
    """The throw-away clone under it, of the snapshot in `reference`; empty: none."""
    owner: str = ""
    """The process that it goes with, as `process_id` names it; empty: it stays."""
    created_unix_ns: int = 0

    @property
    def where(self) -> str:
        """Where a user finds it."""
        return self.directory or self.device

    @property
    def source(self) -> str:
        """What it lies on: `reference`, or its throw-away clone."""
        return f"{self.reference}+{self.clone}" if self.clone else self.reference


def process_id(pid: int) -> str:
    """Return a name of a process that no later one has; empty if there is no such process."""
    try:
        # proc(5), stat: behind the program's name the 20th field is when it started.
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{pid}@{started}"


def is_alive(owner: str) -> bool:
    """Whether the process of this name is still there."""
    return process_id(int(owner.partition("@")[0])) == owner


def new_id() -> str:
    """Return an id for a record."""
    return secrets.token_hex(4)


def write(folder: Path, record: MountRecord) -> None:
    """Write a record down, or anew; it is there whole when this returns."""
    path = folder / f"{_stem(record)}.json"
    fresh = folder / f"{_stem(record)}.new"
    text = json.dumps(codec.document(_KIND, record))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise StateError(f"cannot write down a mount in {folder}: {error.strerror}") from error


def remove(folder: Path, record: MountRecord) -> None:
    """Forget a record; all of its mount is undone."""
    for suffix in ("new", "json"):
        with contextlib.suppress(FileNotFoundError):
            (folder / f"{_stem(record)}.{suffix}").unlink()


def _stem(record: MountRecord) -> str:
    # No volume's name has an `@`: whose record it is, is known also if it cannot be read.
    return f"{record.volume}@{record.id}"


def read(
    folder: Path, *, volume: str | None = None, skips: bool = False
) -> tuple[MountRecord, ...]:
    """Return every record, or a volume's, oldest first.

    Raise `StateError` for one that cannot be read, unless it is another volume's. `skips`: log it.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            record = codec.from_json(MountRecord, document)
        except FileNotFoundError:
            continue  # undone meanwhile
        except (OSError, ValueError, StillblockError) as error:
            owner, at, _ = path.stem.rpartition("@")
            if skips or (at and volume not in (None, owner)):
                # Said by `stillblock mount` and `doctor`; this is looked at every other second.
                _LOG.debug("a mount's record cannot be read: %s: %s", path, error)
                continue
            raise StateError(
                f"the record of a mount, {path}, cannot be read: {error}",
                hint="look at `findmnt` and `losetup`, undo what is left, then remove the file",
            ) from error
        if volume is None or record.volume == volume:
            found.append(record)
    return tuple(sorted(found, key=lambda record: (record.created_unix_ns, record.id)))


@contextmanager
def locked(folder: Path, *, timeout_s: float = LOCK_S) -> Iterator[int]:
    """Keep others from making and undoing mounts; raise `InUseError` if they go on for too long.

    Give the lock's descriptor: a process that inherits it holds the lock until it ends.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise InUseError(
                        f"another mount is being made or undone since {timeout_s:.0f} s",
                        hint=f"whoever does it holds {folder / 'lock'}",
                    ) from None
            time.sleep(_POLL_S)
        yield file.fileno()
