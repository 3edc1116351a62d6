"""A rehearsal: a command on a throw-away clone of a snapshot, its verdict written down."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock.catalog import Catalog
from stillblock.errors import NotFoundError, RefusedError
from stillblock.mounting.records import MountKind
from stillblock.operations.clones import CloneRequest
from stillblock.service.client import RemoteSession, find_server
from stillblock.service.image_tree import file_of
from stillblock.service.mounting import mount_images, unmount
from stillblock.service.serve import ServeOptions, UnixListener, VolumeHost
from stillblock.service.session import open_session

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stillblock.config import Config
    from stillblock.model import CloneInfo
    from stillblock.service.session import Session

IMAGE_VARIABLE: Final = "STILLBLOCK_IMAGE"
URI_VARIABLE: Final = "STILLBLOCK_URI"
_LIFETIME_S: Final = 3600
"""What is left of a rehearsal that was killed goes after this."""
_START_S: Final = 30.0
_SIGNAL_EXIT: Final = 128
"""What a shell adds to the number of the signal that ended a command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a rehearsal ended."""

    volume: str
    snapshot: str
    command: tuple[str, ...]
    exit_code: int
    duration_ms: int
    written_bytes: int
    """What it wrote to the clone, in whole blocks."""
    kept: str = ""
    """The clone, if it was not dropped."""


@contextmanager
def served(config: Config, volume: str) -> Iterator[Session]:
    """Give a session with the process that serves the volume; nobody does: this one, meanwhile."""
    if find_server(config, volume) is not None:
        with open_session(config, volume) as session:
            yield session
        return
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stillblock-"))
        options = ServeOptions(listeners=(UnixListener(path=Path(folder) / "nbd"),))
        host = stack.enter_context(VolumeHost(config, options))
        host.start((volume,))
        is_ready = threading.Event()
        thread = threading.Thread(
            target=lambda: asyncio.run(
                host.run(on_ready=lambda _: is_ready.set(), handles_signals=False)
            ),
            name="rehearsal",
        )
        thread.start()
        stack.callback(thread.join)
        stack.callback(host.stop)
        socket_path = find_server(config, volume) if is_ready.wait(_START_S) else None
        if socket_path is None:
            raise NotFoundError(f"{volume} could not be served for the rehearsal")
        yield RemoteSession(socket_path, volume)


@contextmanager
def cloned(session: Session, asked: CloneRequest, *, is_kept: bool = False) -> Iterator[CloneInfo]:
    """Give a clone that is dropped afterwards, whatever comes of it, unless it is kept."""
    clone = session.create_clone(asked)
    try:
        yield clone
    finally:
        if not is_kept:
            session.delete_clone(clone.snapshot, clone.id, force=True)


@contextmanager
def shown(config: Config, volume: str) -> Iterator[Path]:
    """Give a directory with a served volume's images; it ends with this process, too."""
    with tempfile.TemporaryDirectory(prefix="stillblock-") as folder:
        mount_images(config, volume, Path(folder), is_for_us=True)
        try:
            yield Path(folder)
        finally:
            # Something that a command left behind may still have a file open.
            unmount(config, folder, kinds=(MountKind.IMAGES,), force=True)


def rehearse(
    config: Config,
    volume: str,
    snapshot: str,
    command: Sequence[str],
    *,
    has_image: bool = True,
    is_kept: bool = False,
) -> Verdict:
    """Run a command on a clone of its own; the clone is dropped whatever comes of it.

    The command finds the clone's NBD URI in `STILLBLOCK_URI` and, with `has_image`, a file that is
    the clone in `STILLBLOCK_IMAGE`. Raise `RefusedError` if there is no FUSE for that.
    """
    if has_image and not Path("/dev/fuse").exists():
        raise RefusedError(
            "the clone is shown as a file by FUSE, which is not here",
            hint="modprobe fuse, or use --no-image and $STILLBLOCK_URI",
        )
    with served(config, volume) as session:
        asked = CloneRequest(
            snapshot=snapshot,
            lifetime_s=None if is_kept else _LIFETIME_S,
            description=f"rehearsal of {command[0]}",
        )
        with cloned(session, asked, is_kept=is_kept) as clone:
            verdict = _run(config, session, clone, command, has_image=has_image)
    if is_kept:
        verdict = replace(verdict, kept=clone.reference)
    with Catalog(config.catalog_path) as catalog:
        catalog.record(
            volume,
            "rehearsal_ended",
            snapshot=verdict.snapshot,
            command=" ".join(command),
            exit_code=verdict.exit_code,
            duration_ms=verdict.duration_ms,
            written_bytes=verdict.written_bytes,
        )
    return verdict


def _run(
    config: Config, session: Session, clone: CloneInfo, command: Sequence[str], *, has_image: bool
) -> Verdict:
    uris = [e.uri for e in session.exports().exports if e.name == clone.reference]
    if not uris:
        raise NotFoundError(f"{clone.reference} is not offered to clients")
    environment = os.environ | {URI_VARIABLE: uris[0]}
    with ExitStack() as stack:
        if has_image:
            folder = stack.enter_context(shown(config, clone.volume))
            environment[IMAGE_VARIABLE] = str(folder / file_of(clone.reference))
        began = time.monotonic()
        try:
            ended = subprocess.run(list(command), env=environment, check=False)
        except OSError as error:
            raise NotFoundError(f"{command[0]} cannot be run: {error.strerror}") from error
        duration_ms = round((time.monotonic() - began) * 1000)
    code = ended.returncode
    written = session.show_clone(clone.snapshot, clone.id).own_bytes
    return Verdict(
        volume=clone.volume,
        snapshot=clone.snapshot,
        command=tuple(command),
        exit_code=code if code >= 0 else _SIGNAL_EXIT - code,
        duration_ms=duration_ms,
        written_bytes=written,
    )
