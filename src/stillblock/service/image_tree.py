"""Images of a served volume as files: which there are, and the directories that show them."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Final

from stillblock import native
from stillblock.errors import NotFoundError, StillblockError
from stillblock.mounting import kernel
from stillblock.selection.partitions import read_partitions
from stillblock.selection.places import WHOLE_DISK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stillblock.model import Extents
    from stillblock.selection.disk import Disk

_LOG: Final = logging.getLogger("stillblock.service")


def file_of(export: str) -> str:
    """Return the name of the file that is a whole export.

    `disk.raw`, `@monday.raw`, `@monday+x.raw`: an `@` and a `+` are in no name, so no two meet.
    """
    return f"{_stem(export)}.raw"


def file_of_place(export: str, place: str) -> str:
    """Return the path of the file that is a partition or logical volume of an export."""
    kind, _, name = place.partition(":")
    # A colon is in no name of LVM either.
    return f"{_stem(export)}.parts/{'p' if kind == 'part' else ''}{name.replace('/', ':')}.raw"


def _stem(export: str) -> str:
    _, at, name = export.partition("@")
    return f"@{name}" if at else "disk"


class ImageTree:
    """The files of one volume, and the directories in which they are shown. Not thread-safe."""

    def __init__(self, volume: str, server: native.Server) -> None:
        self._volume = volume
        self._server = server
        self._images = native.Images()
        self._shown: dict[str, native.ImageMount] = {}
        self._more: dict[str, dict[str, Extents | None]] = {}
        """The files of places by export, and where each lies, so that none is shown twice."""

    def add(
        self,
        export: str,
        *,
        access: native.Access,
        created_unix_ns: int,
        disk: Disk | None,
    ) -> None:
        """Show an export, and its partitions as they lie on `disk`."""
        files: list[native.FileSpec] = [(file_of(export), None)]
        if disk is not None:
            files += [
                (file_of_place(export, place), (extent,))
                for place, extent in _partitions(disk, export)
            ]
        self._images.add(
            export, self._server, files=files, access=access, created_unix_ns=created_unix_ns
        )
        self._more[export] = {path: _same(pieces) for path, pieces in files}

    def remove(self, export: str, *, force: bool) -> None:
        """Take an export's files away; raise `InUseError` if they are open, unless forced."""
        if export in self._more:
            self._images.remove(export, force=force)
            del self._more[export]

    def end(self) -> None:
        """Take all files away, for good; who has one open gets errors."""
        for export in tuple(self._more):
            try:
                self.remove(export, force=True)
            except StillblockError:
                _LOG.exception("images not ended in order: export=%s", export)

    def opens(self) -> dict[str, int]:
        """Return how often the files of each export are open."""
        return self._images.opens()

    def path(self, export: str, place: str, pieces: Extents | None) -> str:
        """Return the path of the file that shows a place; it is there from now on."""
        if export not in self._more:
            raise NotFoundError(f"{export} is not offered to clients, so it has no image")
        if place == WHOLE_DISK or pieces is None:
            return file_of(export)
        shown = self._more[export]
        path = first = file_of_place(export, place)
        number = 1
        # A clone was partitioned anew: the old file may be in use, and is of the old place.
        while path in shown and shown[path] != _same(pieces):
            number += 1
            path = f"{first.removesuffix('.raw')}-{number}.raw"
        if path not in shown:
            self._images.extend(export, files=[(path, pieces)])
            shown[path] = _same(pieces)
        return path

    def show(self, directory: str) -> None:
        """Show the files in a directory."""
        device = kernel.mount_fuse(directory, volume=self._volume)
        try:
            self._shown[directory] = self._images.serve(device)
        except BaseException:
            with contextlib.suppress(StillblockError):
                kernel.unmount(directory, lazily=True)
            raise
        finally:
            os.close(device)

    def is_shown(self, directory: str) -> bool:
        """Whether the files are shown there, and answered for."""
        for gone in [path for path, mount in self._shown.items() if mount.is_over]:
            del self._shown[gone]
        return directory in self._shown


def _same(pieces: Sequence[tuple[int, int]] | None) -> Extents | None:
    return None if pieces is None else tuple((start, end) for start, end in pieces)


def _partitions(disk: Disk, export: str) -> list[tuple[str, tuple[int, int]]]:
    """Return (place, extent) of each partition; none where the table cannot be read."""
    try:
        table = read_partitions(disk)
    except StillblockError as error:
        _LOG.info("no partitions shown: export=%s: %s", export, error)
        return []
    if table is None:
        return []
    return [(f"part:{p.number}", p.extent) for p in table.partitions if not p.is_container]
