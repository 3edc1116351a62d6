"""Verify a snapshot: replay and check each of its filesystems on a throw-away clone.

The command does it, not the server: checkers read what a guest wrote, and a process that waits for
a filesystem it serves itself cannot even be killed.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock.errors import MountError, StillblockError
from stillblock.model import (
    CheckOutcome,
    FilesystemCheck,
    Reference,
    SnapshotInfo,
    SnapshotVerification,
)
from stillblock.mounting.checks import how_to_check, outcome_of
from stillblock.mounting.records import MountKind
from stillblock.operations.checking import worst
from stillblock.operations.clones import CloneRequest
from stillblock.operations.mounts import SourceRequest
from stillblock.service.mounting import mount_filesystem, unmount
from stillblock.service.rehearsal import cloned, rehearse, served, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stillblock.config import Config
    from stillblock.operations.checking import FilesystemPlace
    from stillblock.service.session import Session

_LIFETIME_S: Final = 24 * 3600
"""What is left of a verification that was killed goes after this."""
_DETAIL_MAX: Final = 400
_NOTHING: Final = "no filesystem was found on it that could be checked"
_PARTS: Final = ".parts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A snapshot, and what was found."""

    snapshot: SnapshotInfo
    verification: SnapshotVerification


def verify_snapshot(
    config: Config,
    volume: str,
    snapshot: str,
    *,
    command: Sequence[str] = (),
    told: Callable[[str], None] = lambda _: None,
) -> Verified:
    """Check a snapshot, and keep what was found in its receipt; neither it nor the disk changes.

    Without a command each filesystem is replayed and checked by its own tools; `told` hears which.
    A command finds a clone as `stillblock run` shows it; if it ends with anything but 0 that is
    damage.
    """
    with served(config, volume) as session:
        info = session.show_snapshot(snapshot)
        checks = (
            (_by_command(config, info, command),)
            if command
            else _by_their_tools(config, session, info, told)
        )
        verification = SnapshotVerification(
            verified_unix_ns=time.time_ns(),
            outcome=worst(tuple(check.outcome for check in checks)),
            checks=checks,
        )
        kept = session.keep_verification(info.id, verification)
    return Verified(snapshot=kept, verification=verification)


def _by_command(config: Config, info: SnapshotInfo, command: Sequence[str]) -> FilesystemCheck:
    ended = rehearse(config, info.volume, info.id, command)
    return FilesystemCheck(
        place="",
        content=" ".join(command),
        outcome=CheckOutcome.DAMAGED if ended.exit_code else CheckOutcome.SOUND,
        detail=f"it ended with {ended.exit_code}",
        duration_ms=ended.duration_ms,
    )


def _by_their_tools(
    config: Config, session: Session, info: SnapshotInfo, told: Callable[[str], None]
) -> tuple[FilesystemCheck, ...]:
    places = session.list_filesystems(info.id).places
    held = [place for place in places if place.left_out_bytes < place.size_bytes]
    checks = [
        FilesystemCheck(
            place=place.place,
            content=place.content,
            outcome=CheckOutcome.LEFT_OUT,
            detail="the snapshot's rules leave all of it out",
        )
        for place in places
        if place not in held
    ]
    if not held:
        return (*checks, FilesystemCheck(
            place="", content="", outcome=CheckOutcome.UNCHECKED, detail=_NOTHING
        ))  # fmt: skip
    asked = CloneRequest(snapshot=info.id, lifetime_s=_LIFETIME_S, description="verification")
    with cloned(session, asked) as clone, shown(config, info.volume) as directory:
        reference = Reference.parse(clone.reference)
        for place in held:
            told(f"{place.place}, {place.content}")
            began = time.monotonic()
            outcome, detail = _check(config, session, reference, place, directory)
            checks.append(
                FilesystemCheck(
                    place=place.place,
                    content=place.content,
                    outcome=outcome,
                    detail=detail[:_DETAIL_MAX],
                    duration_ms=round((time.monotonic() - began) * 1000),
                )
            )
    return tuple(checks)


def _check(
    config: Config, session: Session, clone: Reference, place: FilesystemPlace, directory: Path
) -> tuple[CheckOutcome, str]:
    """Return what one filesystem came to, and what was said of it."""
    how = how_to_check(place.content)
    if how is None:
        return CheckOutcome.UNCHECKED, f"nothing here checks {place.content}"
    try:
        if how.is_replayed_by_kernel and os.geteuid() == 0:
            _replay(config, clone, place)
        source = session.mount_source(
            SourceRequest(snapshot=clone.snapshot, clone=clone.clone, partition=place.partition)
        )
    except MountError as error:
        return CheckOutcome.DAMAGED, f"its journal cannot be replayed: {error}"
    except StillblockError as error:
        return CheckOutcome.UNCHECKED, str(error)
    shown = Path(source.image)
    # The same file in our directory: the server takes its own away when no mount needs it.
    image = directory / (
        shown.relative_to(shown.parent.parent) if shown.parent.name.endswith(_PARTS) else shown.name
    )
    said = how.note
    for step in how.steps:
        try:
            ended = subprocess.run(
                [*step.command, str(image)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except FileNotFoundError:
            return (
                CheckOutcome.UNCHECKED,
                f"{step.command[0]} is not here: install {how.package}",
            )
        outcome = outcome_of(step, ended.returncode)
        if outcome is not CheckOutcome.SOUND:
            return outcome, f"{' '.join(step.command)}: {_readable(ended.stdout, image)}"
        if ended.returncode:
            said = f"put in order first: {_readable(ended.stdout, image)}"
    return CheckOutcome.SOUND, said


def _replay(config: Config, clone: Reference, place: FilesystemPlace) -> None:
    """Mount a filesystem of the clone for a moment."""
    with tempfile.TemporaryDirectory(prefix="stillblock-") as folder:
        mount_filesystem(config, clone, Path(folder), partition=place.partition)
        unmount(config, folder, kinds=(MountKind.FILESYSTEM,))


def _readable(output: bytes, image: Path) -> str:
    """Return a checker's words in one line, without our path and what a terminal would obey."""
    text = output.decode(errors="replace").replace(f"{image}: ", "").replace(str(image), "it")
    words = " ".join(text.split())
    return "".join(char if char.isprintable() else "?" for char in words)
