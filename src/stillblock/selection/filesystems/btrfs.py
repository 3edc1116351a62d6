"""btrfs on one device: the tree with all its subvolumes, where files lie, what is free.

What is read is the last commit, which nothing overwrites until the next: it is sound whenever it
is looked at, for tree blocks are never written in place. What was synced since lies in a log that
the superblock names, and is kept. The top of the tree is that of the filesystem (subvolume 5), and
subvolumes and snapshots are directories in it, so that every file that has a share in an extent is
met by a walk.
"""

import os
import stat
import struct
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from stillblock.extents import complement, normalise, subtract, union, whole
from stillblock.model import Extent, Extents
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems.btrfs_format import (
    CHUNK_DATA,
    MIRROR_BYTES,
    MIRRORS_AT,
    Chunk,
    read_superblock,
)
from stillblock.selection.filesystems.btrfs_items import (
    DIRECTORY_INDEX,
    EXTENT_DATA,
    INODE_ITEM,
    FileExtent,
    parse_entry,
)
from stillblock.selection.filesystems.btrfs_log import SyncedLog, read_log
from stillblock.selection.filesystems.btrfs_trees import Root, Trees
from stillblock.selection.filesystems.cache import CachedDisk
from stillblock.selection.filesystems.filesystem import (
    FileKind,
    Identity,
    Layout,
    Node,
    Run,
    UnresolvedError,
    laid_out,
    read_runs,
)

EXTENTS_MAX: Final = 1 << 20
"""Of one file; some 200 MiB of them. A file in more pieces is beyond what a reader may hold."""
FREE_EXTENTS_MAX: Final = 1 << 21
_INODES_MAX: Final = 4096
_ROOTS_MAX: Final = 1024
"""Inodes and subvolumes that are remembered."""
_RESERVED_BYTES: Final = 1 << 20
"""At the start of the device, where the boot loader's and old filesystems' things are."""
_SYMLINK_BYTES_MAX: Final = 4096

_TREE_EXTENTS: Final = 2
_TREE_FILES: Final = 5
_TREE_BLOCK_GROUPS: Final = 11
_SUBVOLUMES_FROM: Final = 256
_NUMBER_INODE_BITS: Final = 40
_NUMBER_TREE_BITS: Final = 23
"""A node's number is its tree's and its inode's, in 63 bits: 8 million subvolumes ever made, a
trillion inodes in each."""

_ROOT_REFERENCE: Final = 156
_EXTENT_ITEM: Final = 168
_METADATA_ITEM: Final = 169
_BLOCK_GROUP_ITEM: Final = 192

_INODE: Final = struct.Struct("<QQQ8x8xIIII8x8x8x32x12x12xQI12x")
assert _INODE.size == 160
_ROOT_REFERENCE_HEAD: Final = struct.Struct("<Q8xH")


def open_btrfs(disk: Disk) -> "Btrfs":
    """Return the btrfs filesystem on a disk, partition or volume."""
    return Btrfs(disk)


class Btrfs:
    """One btrfs filesystem."""

    def __init__(self, disk: Disk) -> None:
        self._disk = CachedDisk(disk)
        self._superblock = read_superblock(self._disk)
        self._read_trees: Trees | None = None
        self._read_log = SyncedLog((), frozenset())
        self._roots: OrderedDict[int, Root] = OrderedDict()
        self._nodes: OrderedDict[int, Node] = OrderedDict()

    @property
    def identity(self) -> Identity:
        """Which one it is."""
        superblock = self._superblock
        return Identity(
            kind="btrfs",
            label=superblock.label,
            uuid=str(uuid.UUID(bytes=superblock.uuid)),
            block_size=superblock.sector_size,
            size=superblock.device_bytes,
        )

    @property
    def caveats(self) -> tuple[str, ...]:
        """What is left out reads as an error; what was synced since the last commit is kept."""
        checksums = "what is left out of files reads as an I/O error, for its checksums stay"
        if self._superblock.log_root:
            return (checksums, "what was synced since its last commit is kept, whatever it is")
        return (checksums,)

    def root(self) -> Node:
        """Return the top directory, of the filesystem and not of the default subvolume."""
        node = self._node(_TREE_FILES, self._root(_TREE_FILES).directory)
        if node.kind is not FileKind.DIRECTORY:
            raise UnresolvedError("btrfs: the root is no directory")
        return node

    def children(self, directory: Node) -> Iterator[tuple[str, Node]]:
        """Yield the names in a directory and what they lead to; subvolumes are directories."""
        tree, inode = _parts(directory.number)
        if directory.kind is not FileKind.DIRECTORY:
            raise UnresolvedError(f"btrfs: inode {inode} is no directory")
        first = (inode, DIRECTORY_INDEX, 0)
        for item, value in self._trees.scan(self._root(tree), first):
            if item[:2] != first[:2]:
                break
            entry = parse_entry(value)
            name = os.fsdecode(entry.name)
            if entry.kind == INODE_ITEM:
                yield name, self._node(tree, entry.number)
            elif self._is_mounted_at(entry.number, tree, inode, entry.name):
                yield name, self._node(entry.number, self._root(entry.number).directory)

    def runs(self, node: Node) -> tuple[Run, ...]:
        """Return where a regular file's data lies; compressed pieces are encoded runs."""
        if node.kind is not FileKind.REGULAR:
            raise UnresolvedError(f"btrfs: node {node.number} is no regular file")
        runs: list[Run] = []
        for offset, extent in self._extents(node):
            if not extent.is_inline and extent.address:
                runs += self._runs_of(node, offset, extent)
            if len(runs) > EXTENTS_MAX:
                raise UnresolvedError(f"btrfs: a file has more than {EXTENTS_MAX} extents")
        return tuple(runs)

    def layout(self, node: Node) -> Layout:
        """Return where a regular file's bytes are; small ones lie in the tree."""
        if _parts(node.number) in self._log.inodes:
            raise UnresolvedError("btrfs: a file that was synced since the last commit is not read")
        first = next(self._extents(node), None)
        inline: Extents = ()
        if first is not None and first[0] == 0 and first[1].is_inline:
            if first[1].is_compressed:
                raise UnresolvedError("it is compressed, which is not read")
            inline = whole(min(node.size, len(first[1].inline)))
        return laid_out(self.runs(node), size=node.size, by_reader=inline)

    def read(self, node: Node, *, offset: int, length: int) -> bytes:
        """Return data of a regular file, or the target of a link."""
        if _parts(node.number) in self._log.inodes:
            raise UnresolvedError("btrfs: a file that was synced since the last commit is not read")
        extents = list(self._extents(node))
        if any(extent.is_compressed for _, extent in extents):
            raise UnresolvedError("btrfs: compressed files are not read")
        inline = extents[0][1].inline if extents and extents[0][0] == 0 else b""
        if node.kind is FileKind.SYMLINK:
            if not 0 < node.size <= min(_SYMLINK_BYTES_MAX, len(inline)):
                raise UnresolvedError(f"btrfs: link {node.number} is damaged")
            return inline[: node.size][offset : offset + length]
        data = read_runs(self._disk, self.runs(node), size=node.size, offset=offset, length=length)
        piece = inline[offset : offset + len(data)]
        return piece + data[len(piece) :]

    def free(self) -> Extents:
        """Return what no extent item holds, on every copy, and what no chunk holds."""
        device_bytes = self._superblock.device_bytes
        in_chunks = normalise(
            (copy, copy + chunk.length) for chunk in self._trees.map.chunks for copy in chunk.copies
        )
        found = list(complement(in_chunks, size=device_bytes))
        used = self._used_by_block_groups()
        allocated = self._allocated()
        extent = next(allocated, None)
        for chunk in self._trees.map.chunks:
            position, total = chunk.start, 0
            while extent is not None and extent[0] < chunk.end:
                start, end = extent
                if start < position or end > chunk.end:
                    raise _in_no_chunk(start)
                self._add_free(chunk, position, start, found)
                position = end
                total += end - start
                extent = next(allocated, None)
            self._add_free(chunk, position, chunk.end, found)
            told = used.get((chunk.start, chunk.length))
            if told != total:
                raise UnresolvedError(
                    f"btrfs: the chunk at address {chunk.start} says that {told} bytes are in use, "
                    f"and {total} are"
                )
        if extent is not None:
            raise _in_no_chunk(extent[0])
        return subtract(normalise(found), self.fixed())

    def fixed(self) -> Extents:
        """Return the first MiB, the superblocks, and what was synced since the last commit."""
        device_bytes = self._superblock.device_bytes
        reserved = normalise(
            (start, min(start + length, device_bytes))
            for start, length in (
                (0, _RESERVED_BYTES),
                *((mirror, MIRROR_BYTES) for mirror in MIRRORS_AT),
            )
            if start < device_bytes
        )
        return union(reserved, self._log.held)

    # Trees and inodes ---------------------------------------------------------------------------

    @property
    def _trees(self) -> Trees:
        if self._read_trees is None:
            trees = Trees(self._disk, self._superblock)
            if self._superblock.log_root:
                self._read_log = read_log(trees, self._superblock)
            self._read_trees = trees
        return self._read_trees

    @property
    def _log(self) -> SyncedLog:
        """What was synced since the last commit; it is read with the trees."""
        assert self._trees is not None, "asked for so that it was read"
        return self._read_log

    def _root(self, tree: int) -> Root:
        root = self._roots.get(tree)
        if root is None:
            root = self._trees.root(tree)
            self._roots[tree] = root
            if len(self._roots) > _ROOTS_MAX:
                self._roots.popitem(last=False)
        return root

    def _is_mounted_at(self, tree: int, parent: int, directory: int, name: bytes) -> bool:
        """Whether a subvolume is in that directory; in a snapshot of the directory it is not."""
        if not _SUBVOLUMES_FROM <= tree < 1 << _NUMBER_TREE_BITS:
            raise UnresolvedError(f"btrfs: a name leads to subvolume {tree}, which cannot be")
        value = self._trees.in_root_tree((parent, _ROOT_REFERENCE, tree))
        if value is None or len(value) < _ROOT_REFERENCE_HEAD.size:
            return False
        own_directory, length = _ROOT_REFERENCE_HEAD.unpack_from(value)
        own_name = value[_ROOT_REFERENCE_HEAD.size :][:length]
        return own_directory == directory and own_name == name and self._root(tree).references > 0

    def _node(self, tree: int, inode: int) -> Node:
        if not 0 < inode < 1 << _NUMBER_INODE_BITS:
            raise UnresolvedError(f"btrfs: inode {inode} cannot be")
        number = tree << _NUMBER_INODE_BITS | inode
        node = self._nodes.get(number)
        if node is None:
            value = self._trees.get(self._root(tree), (inode, INODE_ITEM, 0))
            if value is None or len(value) != _INODE.size:
                raise UnresolvedError(f"btrfs: inode {inode} of subvolume {tree} is damaged")
            generation, _, size, links, uid, gid, mode, seconds, nanoseconds = _INODE.unpack(value)
            if size >= 1 << 63 or links == 0:
                raise UnresolvedError(f"btrfs: inode {inode} of subvolume {tree} is damaged")
            node = Node(
                number=number,
                generation=generation,
                kind=FileKind.of_mode(mode),
                size=size,
                links=links,
                mode=stat.S_IMODE(mode),
                uid=uid,
                gid=gid,
                modified_ns=(seconds - (seconds >> 63 << 64)) * 10**9 + nanoseconds,
            )
            self._nodes[number] = node
            if len(self._nodes) > _INODES_MAX:
                self._nodes.popitem(last=False)
        return node

    # Extents of files ---------------------------------------------------------------------------

    def _extents(self, node: Node) -> Iterator[tuple[int, FileExtent]]:
        """Yield (offset in the file, extent) of a file, in order."""
        tree, inode = _parts(node.number)
        first = (inode, EXTENT_DATA, 0)
        for item, value in self._trees.scan(self._root(tree), first):
            if item[:2] != first[:2]:
                break
            yield item[2], FileExtent.parse(value)

    def _runs_of(self, node: Node, offset: int, extent: FileExtent) -> list[Run]:
        """Return the copies of one extent of a file."""
        address, length = extent.address + extent.skip, extent.length
        if extent.is_compressed:
            address, length = extent.address, extent.size
        chunk = self._trees.map.chunk(address, length, what=f"node {node.number}")
        if not chunk.flags & CHUNK_DATA or offset + extent.length >= 1 << 63:
            raise UnresolvedError(f"btrfs: node {node.number} has a damaged extent at {offset}")
        return [
            Run(
                offset,
                length,
                copy + (address - chunk.start),
                extent.is_unwritten,
                extent.is_compressed,
            )
            for copy in chunk.copies
        ]

    # Free space ---------------------------------------------------------------------------------

    def _allocated(self) -> Iterator[Extent]:
        """Yield the logical ranges that are in use, in order, disjoint."""
        end = 0
        size = self._superblock.node_size
        for leaf in self._trees.leaves(self._root(_TREE_EXTENTS)):
            for address, kind, offset, _, _ in leaf.items:
                if kind == _EXTENT_ITEM:
                    length = offset
                elif kind == _METADATA_ITEM:
                    length = size
                else:
                    continue
                if address < end or length == 0:
                    raise UnresolvedError(
                        f"btrfs: the extent at address {address} overlaps another"
                    )
                end = address + length
                yield address, end

    def _used_by_block_groups(self) -> dict[tuple[int, int], int]:
        """Return how much of each chunk is in use, as the filesystem counts it."""
        in_own_tree = self._superblock.has_block_group_tree
        root = self._root(_TREE_BLOCK_GROUPS if in_own_tree else _TREE_EXTENTS)
        used: dict[tuple[int, int], int] = {}
        for leaf in self._trees.leaves(root):
            for item in leaf.items:
                if item[1] == _BLOCK_GROUP_ITEM:
                    used[item[0], item[2]] = int.from_bytes(leaf.value(item)[:8], "little")
        return used

    def _add_free(self, chunk: Chunk, start: int, end: int, found: list[Extent]) -> None:
        if start < end:
            found.extend(
                (copy + start - chunk.start, copy + end - chunk.start) for copy in chunk.copies
            )
            if len(found) > FREE_EXTENTS_MAX:
                raise UnresolvedError(f"btrfs: more than {FREE_EXTENTS_MAX} free extents")


def _in_no_chunk(address: int) -> UnresolvedError:
    return UnresolvedError(f"btrfs: the extent at address {address} is not in a chunk")


def _parts(number: int) -> tuple[int, int]:
    """Return (tree, inode) of a node's number."""
    return number >> _NUMBER_INODE_BITS, number & ((1 << _NUMBER_INODE_BITS) - 1)
