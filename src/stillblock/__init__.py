"""Snapshots of exactly the blocks you choose, of a disk that stays in use.

    with stillblock.open("web") as volume:
        monday = volume.snapshot("monday", exclude=["part:3"])
        first_block = monday.view().pread(offset=0, length=4096)

docs/api.md is the contract. Importing this package is cheap: the rest is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillblock.errors import StillblockError
    from stillblock.library import (
        Bookmark,
        Clone,
        Snapshot,
        View,
        ViewExtent,
        Volume,
        create,
        open,  # noqa: A004 - it reads as stillblock.open
        snapshot_group,
    )

__all__ = [
    "Bookmark",
    "Clone",
    "Snapshot",
    "StillblockError",
    "View",
    "ViewExtent",
    "Volume",
    "create",
    "open",
    "snapshot_group",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'stillblock' has no attribute {name!r}")
    from stillblock import errors, library  # noqa: PLC0415 - only when used

    return getattr(errors if name == "StillblockError" else library, name)
