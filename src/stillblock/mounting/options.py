"""How each filesystem is mounted so that nothing is changed, or all of it may be. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stillblock.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Collection

SAFE: Final = ("nosuid", "nodev")
"""Always: what a guest wrote must not give rights on this machine."""
_PRIVATE: Final = ("umask=077",)
"""Where files have no owners that the kernel knows: nobody else on this machine reads them."""
_TEMPORARY_FSID: Final = (6, 7)
"""From this kernel on, btrfs mounts a copy beside the original under an fsid of the moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HowToMount:
    """What to tell `mount`."""

    kind: str | None
    """The kernel's name for the filesystem; None: `mount` finds out."""
    options: tuple[str, ...]
    is_device_writable: bool
    """Whether the device under it has to be."""


def how_to_mount(
    content: str | None,
    *,
    is_writable: bool,
    replays: bool = False,
    filesystems: Collection[str] = (),
    has_ntfs_3g: bool = False,
) -> HowToMount:
    """Return how a filesystem of this family is mounted.

    Neither writable nor replayed: nothing is written to the device, not even what its journal says,
    so the last changes before the instant may be missing where the filesystem was not quiesced.
    `filesystems` are those that the kernel has.
    """
    untouched = not is_writable and not replays
    access = "rw" if is_writable else "ro"
    kind, more = _KINDS.get(content, (None, ()))
    options: tuple[str, ...] = (access, *SAFE)
    match content:
        case "ext" | "btrfs" if untouched:
            options += more
        case "xfs":
            # The same uuid is mounted elsewhere if the live filesystem is.
            options += ("nouuid", *(more if untouched else ()))
        case "ntfs":
            kind = "ntfs3" if "ntfs3" in filesystems else kind
            if kind == "ntfs-3g" and not has_ntfs_3g and "ntfs3" not in filesystems:
                kind = "ntfs3"  # a module that is loaded when it is asked for
            options += _PRIVATE
            if kind == "ntfs-3g" and untouched:
                options += more
        case "fat" | "exfat":
            options += _PRIVATE
    return HowToMount(kind=kind, options=options, is_device_writable=not untouched)


_KINDS: Final[dict[str | None, tuple[str, tuple[str, ...]]]] = {
    "ext": ("ext4", ("noload",)),
    "xfs": ("xfs", ("norecovery",)),
    "btrfs": ("btrfs", ("rescue=nologreplay",)),
    "ntfs": ("ntfs-3g", ("norecover",)),
    "fat": ("vfat", ()),
    "exfat": ("exfat", ()),
}
"""By family: the kernel's name, and what keeps its journal from being replayed."""


def needs_new_fsid(
    *, kernel_release: str, is_fsid_known: bool, has_own_clone: bool, reference: str
) -> bool:
    """Return whether a btrfs has to get another fsid before it is mounted.

    An older kernel takes a second device with an fsid that it knows for another path to the first,
    and may go on writing there. Raise `RefusedError` if that would happen and the filesystem is
    not on a clone that is thrown away.
    """
    if not is_fsid_known or kernel_version(kernel_release) >= _TEMPORARY_FSID:
        return False
    if has_own_clone:
        return True
    raise RefusedError(
        f"{reference} holds a btrfs that this kernel ({kernel_release}) knows already, and kernels "
        "before 6.7 take one for the other",
        hint="add --writable: a throw-away clone gets an fsid of its own",
    )


def kernel_version(release: str) -> tuple[int, int]:
    """Return major and minor version of a kernel; (0, 0) for what is none."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)
