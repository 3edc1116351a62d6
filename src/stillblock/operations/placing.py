"""Giving a file its name once it is whole, without taking anybody's place."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_NOT_OFFERED: Final = frozenset(
    {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK}
)
"""What filesystems say that know no such rename, or no second name of a file."""


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a file; raise `FileExistsError` if the name is taken, another `OSError` if it fails.

    Durable after `sync_folder`.
    """
    try:
        _rename_new(partial, target)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    else:
        return
    try:
        # Unlike a rename, a link takes nobody's place.
        os.link(partial, target)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    else:
        partial.unlink()
        return
    # A filesystem with neither, such as exFAT in user space: the moment between is all that is left
    # to somebody else.
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    partial.rename(target)


def sync_folder(path: Path) -> None:
    """Make the name of a file durable."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _rename_new(old: Path, new: Path) -> None:
    """Rename as renameat2(2) with RENAME_NOREPLACE; `ENOSYS` where the C library has it not."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if rename is not None:
        names = os.fsencode(old), os.fsencode(new)
        if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), str(old), None, str(new))
