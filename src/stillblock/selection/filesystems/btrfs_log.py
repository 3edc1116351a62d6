"""The log of btrfs: what was synced since the last commit, in trees that the superblock names.

The next mount replays it: files get the extents and names that it has. Here it is not replayed,
but respected: all that it takes is kept, and it is refused where it gives a name to a file that the
last commit has under others, for then nobody can say from the commit which file a path means. A
file that it makes anew has no name in the commit, and so nothing can leave it out; whoever reads
files is told which names a mount would find or miss beside those of the commit.
"""

import struct
from collections import defaultdict
from collections.abc import Iterator
from typing import Final, NamedTuple

from stillblock.extents import normalise
from stillblock.model import Extent, Extents
from stillblock.selection.filesystems.btrfs_format import Superblock
from stillblock.selection.filesystems.btrfs_items import (
    DIRECTORY_INDEX,
    EXTENT_DATA,
    INODE_ITEM,
    ROOT_ITEM,
    Entry,
    FileExtent,
    parse_entry,
)
from stillblock.selection.filesystems.btrfs_trees import Root, Trees
from stillblock.selection.filesystems.filesystem import UnresolvedError

_TREE_OF_LOGS: Final = (1 << 64) - 6
_EXTENTS_MAX: Final = 1 << 20
_INODE_REFERENCE: Final = 12
_INODE_REFERENCE_LONG: Final = 13
_LISTED: Final = 72
"""A stretch of a directory's indexes that the log has all of: what is not there was unlinked."""
_LINKS: Final = struct.Struct("<40xI")
"""Where an inode says how many names it has."""
_REFERENCE: Final = struct.Struct("<QH")
_REFERENCE_LONG: Final = struct.Struct("<QQH")


class SyncedLog(NamedTuple):
    """What a log has."""

    held: Extents
    """Its own blocks, and the extents of files in it."""
    inodes: frozenset[tuple[int, int]]
    """(subvolume, inode) whose content it changes."""
    roots: dict[int, Root]
    """The log of each subvolume that has one."""


def read_log(trees: Trees, superblock: Superblock) -> SyncedLog:
    """Return what the log has; raise `UnresolvedError` if it moves files."""
    blocks: list[int] = []
    logs = _logs(trees, superblock, blocks)
    held: list[Extent] = []
    inodes: set[tuple[int, int]] = set()
    for subvolume, log in logs:
        committed = trees.root(subvolume)
        for leaf in trees.leaves(log, blocks=blocks):
            for item in leaf.items:
                value = leaf.value(item)
                if item[1] == EXTENT_DATA:
                    inodes.add((subvolume, item[0]))
                    held += _places(trees, value)
                elif item[1] == INODE_ITEM:
                    inodes.add((subvolume, item[0]))
                else:
                    _require_known_names(trees, committed, item[:3], value)
            if len(held) > _EXTENTS_MAX or len(blocks) > _EXTENTS_MAX:
                raise UnresolvedError("btrfs: its log of synced files is too large")
    size = superblock.node_size
    for address in blocks:
        held += [(place, place + size) for place in trees.map.places(address, size, what="its log")]
    return SyncedLog(normalise(held), frozenset(inodes), dict(logs))


def read_names(trees: Trees, superblock: Superblock) -> dict[tuple[int, int], frozenset[bytes]]:
    """Return for (subvolume, directory) the names that are others with the log than in the commit.

    Those of new files, and those that led to what was unlinked or replaced since: rather too many.
    Raise `UnresolvedError` if that cannot be told.
    """
    changed: defaultdict[tuple[int, int], set[bytes]] = defaultdict(set)
    for subvolume, log in _logs(trees, superblock, []):
        committed = trees.root(subvolume)
        count = 0
        for leaf in trees.leaves(log):
            for item in leaf.items:
                for directory, name in _changed_by(
                    trees, committed, log, item[:3], leaf.value(item)
                ):
                    changed[subvolume, directory].add(name)
                    count += 1
                    if count > _EXTENTS_MAX:
                        raise UnresolvedError("btrfs: its log of synced files is too large")
    return {place: frozenset(names) for place, names in changed.items()}


def _changed_by(
    trees: Trees, committed: Root, log: Root, key: tuple[int, int, int], value: bytes
) -> Iterator[tuple[int, bytes]]:
    """Yield (directory, name) of what one item of a log makes another than the commit has it."""
    if key[1] == DIRECTORY_INDEX:
        before = trees.get(committed, key)
        if before != value:
            yield key[0], parse_entry(value).name
            if before is not None:
                yield key[0], parse_entry(before).name
    elif key[1] in {_INODE_REFERENCE, _INODE_REFERENCE_LONG}:
        named = set(_references(key, value))
        parents = {parent for parent, _ in named}
        known = _names_in(trees, committed, key[0])
        yield from named - known
        # The log has all names in a directory, or none.
        in_parents = {reference for reference in known if reference[0] in parents}
        yield from in_parents - _names_in(trees, log, key[0])
    elif key[1] == INODE_ITEM:
        before = trees.get(committed, key)
        if before is not None and _links(before) != _links(value):
            yield from _names_in(trees, committed, key[0]) ^ _names_in(trees, log, key[0])
    elif key[1] == _LISTED:
        end = int.from_bytes(value[:8], "little")
        for index, entry in _entries(trees, committed, key[0], key[2]):
            if index > end:
                break
            if trees.get(log, (key[0], DIRECTORY_INDEX, index)) is None:
                yield key[0], entry.name


def _entries(trees: Trees, root: Root, directory: int, first: int) -> Iterator[tuple[int, Entry]]:
    """Yield (index, entry) of a directory from an index on."""
    for item, value in trees.scan(root, (directory, DIRECTORY_INDEX, first)):
        if item[:2] != (directory, DIRECTORY_INDEX):
            break
        yield item[2], parse_entry(value)


def _names_in(trees: Trees, root: Root, inode: int) -> set[tuple[int, bytes]]:
    """Return (directory, name) of all names that a tree has for an inode."""
    found: set[tuple[int, bytes]] = set()
    for item, value in trees.scan(root, (inode, _INODE_REFERENCE, 0)):
        if item[0] != inode or item[1] > _INODE_REFERENCE_LONG:
            break
        found.update(_references(item[:3], value))
    return found


def _links(value: bytes) -> int:
    if len(value) < _LINKS.size:
        raise UnresolvedError("btrfs: its log of synced files has a damaged inode")
    (links,) = _LINKS.unpack_from(value)
    return int(links)


def _logs(trees: Trees, superblock: Superblock, blocks: list[int]) -> list[tuple[int, Root]]:
    """Return (subvolume, root) of each log; the blocks that name them are added to `blocks`."""
    # It belongs to the commit that was to come.
    top = Root(superblock.log_root, superblock.log_level, superblock.generation + 1)
    logs: list[tuple[int, Root]] = []
    for leaf in trees.leaves(top, blocks=blocks):
        for item in leaf.items:
            if item[:2] != (_TREE_OF_LOGS, ROOT_ITEM):
                raise UnresolvedError("btrfs: its log of synced files is not understood")
            logs.append((item[2], trees.parse_root(leaf.value(item))))
    return logs


def _places(trees: Trees, value: bytes) -> list[Extent]:
    """Return where the whole of an extent lies, every copy."""
    extent = FileExtent.parse(value)
    if extent.is_inline or extent.address == 0:
        return []
    places = trees.map.places(extent.address, extent.size, what="its log")
    return [(place, place + extent.size) for place in places]


def _require_known_names(
    trees: Trees, committed: Root, key: tuple[int, int, int], value: bytes
) -> None:
    """Raise if an item names a file of the last commit otherwise than the commit does."""
    if key[1] == DIRECTORY_INDEX:
        entry = parse_entry(value)
        if entry.kind == ROOT_ITEM:
            if trees.get(committed, key) != value:
                raise _moved()
            return
        named = [(entry.number, key[0], entry.name)]
    elif key[1] in {_INODE_REFERENCE, _INODE_REFERENCE_LONG}:
        named = [(key[0], parent, name) for parent, name in _references(key, value)]
    else:
        return
    for inode, parent, name in named:
        if trees.get(committed, (inode, INODE_ITEM, 0)) is None:
            continue  # made since the commit
        if (parent, name) not in _names_in(trees, committed, inode):
            raise _moved()


def _moved() -> UnresolvedError:
    return UnresolvedError(
        "btrfs: its log of synced files gives a file another name, and is not replayed here; "
        "freeze it during the snapshot"
    )


def _references(key: tuple[int, int, int], value: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (directory, name) of an inode's references."""
    at = 0
    is_long = key[1] == _INODE_REFERENCE_LONG
    layout = _REFERENCE_LONG if is_long else _REFERENCE
    while at < len(value):
        if at + layout.size > len(value):
            raise UnresolvedError(f"btrfs: inode {key[0]} has damaged names")
        fields = layout.unpack_from(value, at)
        at += layout.size
        name = value[at : at + fields[-1]]
        at += len(name)
        if len(name) != fields[-1] or not name:
            raise UnresolvedError(f"btrfs: inode {key[0]} has damaged names")
        yield (fields[0] if is_long else key[2]), name
