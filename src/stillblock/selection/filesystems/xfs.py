"""XFS, version 5: the tree, where files lie, what is free.

A walk follows directories; an inode's number says where it lies, so no map of inodes is needed.
Free is what each group's tree of free space by block number says. A file that shares extents with
others (reflink) gives them like any other: whoever leaves out a file's runs subtracts those of the
files that stay. XFS has no other owners of file data that survive a crash: unlinked files that were
open are freed when it is next mounted, and so are extents that were only prepared for a copy.
"""

import os
import stat
import struct
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Final

from stillblock.extents import normalise
from stillblock.model import Extent, Extents
from stillblock.selection.disk import Disk, read_exactly
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
from stillblock.selection.filesystems.xfs_format import (
    FORMAT_BTREE,
    FORMAT_EXTENTS,
    FORMAT_LOCAL,
    TREE_LEVELS_MAX,
    FileExtent,
    Inode,
    has_checksum,
    parse_inode,
    read_superblock,
    require_checksum,
    tree_leaves,
    unpack_extents,
)
from stillblock.selection.filesystems.xfs_replay import settle

EXTENTS_MAX: Final = 1 << 20
"""Of one file; some 200 MiB of them. A file in more pieces is beyond what a reader may hold."""
FREE_EXTENTS_MAX: Final = 1 << 21
_INODES_MAX: Final = 4096
"""Inodes that are remembered between a walk that finds them and the question where they lie."""
_SYMLINK_BYTES_MAX: Final = 1024
_DIRECTORY_LEAVES_AT: Final = 1 << 35
"""Where a directory's hash index begins: 32 GiB into it. The names are below."""
_OFFSET_MAX: Final = 1 << 63

_AGF: Final = struct.Struct(">4sIIII8xI16xII8x16s")
_AGF_CHECKSUM_AT: Final = 216
_DIRECTORY_HEADER: Final = struct.Struct(">4s4xQ8x16sQ12x4x")
_SYMLINK_HEADER: Final = struct.Struct(">4sIII16sQQQ")


def open_xfs(disk: Disk) -> "Xfs":
    """Return the XFS filesystem on a disk, partition or volume."""
    return Xfs(disk)


class Xfs:
    """One XFS filesystem."""

    def __init__(self, disk: Disk) -> None:
        self._raw = CachedDisk(disk)
        self._superblock = read_superblock(self._raw)
        self._disk: Disk | None = None
        self._caveats: tuple[str, ...] = ()
        self._inodes: OrderedDict[int, Inode] = OrderedDict()

    @property
    def identity(self) -> Identity:
        """Which one it is."""
        superblock = self._superblock
        return Identity(
            kind="xfs",
            label=superblock.label,
            uuid=str(uuid.UUID(bytes=superblock.uuid)),
            block_size=superblock.block_size,
            size=superblock.block_count * superblock.block_size,
            is_case_sensitive=superblock.is_case_sensitive,
        )

    @property
    def caveats(self) -> tuple[str, ...]:
        """What was done to read it, once it was."""
        return self._caveats

    def root(self) -> Node:
        """Return the top directory."""
        node = self._node(self._superblock.root)
        if node.kind is not FileKind.DIRECTORY:
            raise UnresolvedError("XFS: the root is no directory")
        return node

    def children(self, directory: Node) -> Iterator[tuple[str, Node]]:
        """Yield the names in a directory and what they lead to."""
        inode = self._inode(directory.number)
        if not stat.S_ISDIR(inode.mode):
            raise UnresolvedError(f"XFS: inode {inode.number} is no directory")
        for name, number in self._entries(inode):
            if b"/" in name or b"\0" in name:
                raise UnresolvedError(f"XFS: directory {inode.number} holds the name {name!r}")
            if name not in {b".", b".."}:
                yield os.fsdecode(name), self._node(number)

    def runs(self, node: Node) -> tuple[Run, ...]:
        """Return where a regular file's data lies."""
        inode = self._inode(node.number)
        if not stat.S_ISREG(inode.mode):
            raise UnresolvedError(f"XFS: inode {inode.number} is no regular file")
        superblock = self._superblock
        shift = superblock.block_log
        what = f"inode {inode.number}"
        return tuple(
            Run(
                extent.offset << shift,
                extent.length << shift,
                superblock.place(extent.block, extent.length, what=what),
                extent.is_unwritten,
            )
            for extent in self._extents(inode)
        )

    def layout(self, node: Node) -> Layout:
        """Return where a regular file's bytes are."""
        return laid_out(self.runs(node), size=node.size)

    def read(self, node: Node, *, offset: int, length: int) -> bytes:
        """Return data of a regular file, or the target of a link."""
        inode = self._inode(node.number)
        if stat.S_ISLNK(inode.mode):
            return self._target(inode)[offset : offset + length]
        return read_runs(
            self._settled(), self.runs(node), size=inode.size, offset=offset, length=length
        )

    def free(self) -> Extents:
        """Return what the groups' trees of free space hold.

        Blocks in a group's free list, a few that its trees grow into, are not among them.
        """
        found: list[Extent] = []
        for ag in range(self._superblock.ag_count):
            found.extend(self._free_of(ag))
            if len(found) > FREE_EXTENTS_MAX:
                raise UnresolvedError(f"XFS: more than {FREE_EXTENTS_MAX} free extents")
        return normalise(found)

    def fixed(self) -> Extents:
        """Return the groups' headers and the log."""
        superblock = self._superblock
        stride = superblock.ag_blocks * superblock.block_size
        headers = [
            (ag * stride, ag * stride + self._header_blocks * superblock.block_size)
            for ag in range(superblock.ag_count)
        ]
        if superblock.log_start == 0:
            return normalise(headers)  # it is on another device
        log = superblock.place(superblock.log_start, superblock.log_blocks, what="the log")
        return normalise([*headers, (log, log + superblock.log_blocks * superblock.block_size)])

    @property
    def _header_blocks(self) -> int:
        """Blocks that hold the four header sectors of a group: superblock, AGF, AGI, AGFL."""
        return -(-4 * self._superblock.sector_size // self._superblock.block_size)

    def _settled(self) -> Disk:
        """Return the disk as its own recovery would leave it; raise if that cannot be told."""
        if self._disk is None:
            self._disk, self._caveats = settle(self._raw, self._superblock)
        return self._disk

    # Inodes and extents -------------------------------------------------------------------------

    def _inode(self, number: int) -> Inode:
        inode = self._inodes.get(number)
        if inode is None:
            disk = self._settled()
            superblock = self._superblock
            data = read_exactly(
                disk, offset=superblock.inode_place(number), length=superblock.inode_size
            )
            inode = parse_inode(superblock, number, data)
            self._inodes[number] = inode
            if len(self._inodes) > _INODES_MAX:
                self._inodes.popitem(last=False)
        return inode

    def _node(self, number: int) -> Node:
        inode = self._inode(number)
        return Node(
            number=number,
            generation=inode.generation,
            kind=FileKind.of_mode(inode.mode),
            size=inode.size,
            links=inode.links,
            mode=stat.S_IMODE(inode.mode),
            uid=inode.uid,
            gid=inode.gid,
            modified_ns=inode.modified_ns,
        )

    def _extents(self, inode: Inode) -> list[FileExtent]:
        """Return the data fork's extents: ascending, disjoint, none empty, as many as it says."""
        what = f"inode {inode.number}"
        if inode.is_realtime:
            raise UnresolvedError(f"XFS: {what} lies on a realtime device")
        if inode.extent_count > EXTENTS_MAX:
            raise UnresolvedError(f"XFS: {what} has {inode.extent_count} extents")
        found: list[FileExtent] = []
        if inode.format == FORMAT_EXTENTS:
            if inode.extent_count * 16 > len(inode.fork):
                raise UnresolvedError(f"XFS: {what} has more extents than it holds")
            found = unpack_extents(inode.fork, inode.extent_count)
            self._require_order(found, 0, what=what)
        elif inode.format == FORMAT_BTREE:
            for records in tree_leaves(
                self._settled(),
                self._superblock,
                self._fork_roots(inode),
                is_long=True,
                owner=inode.number,
                what=what,
            ):
                extents = unpack_extents(records, len(records) // 16)
                after = found[-1].offset + found[-1].length if found else 0
                self._require_order(extents, after, what=what)
                found += extents
                if len(found) > inode.extent_count:
                    break
        else:
            raise UnresolvedError(f"XFS: {what} has a data fork of kind {inode.format}")
        if len(found) != inode.extent_count:
            raise UnresolvedError(f"XFS: {what} says {inode.extent_count} extents and has others")
        return found

    def _require_order(self, extents: list[FileExtent], after: int, *, what: str) -> None:
        for extent in extents:
            if extent.offset < after or extent.length == 0:
                raise UnresolvedError(f"XFS: {what} has extents out of order")
            after = extent.offset + extent.length
        if after << self._superblock.block_log > _OFFSET_MAX:
            raise UnresolvedError(f"XFS: {what} has extents beyond what a file can have")

    @staticmethod
    def _fork_roots(inode: Inode) -> list[tuple[int, int]]:
        """Return the blocks below the root of a fork's tree, which is in the inode."""
        places_max = (len(inode.fork) - 4) // 16
        if places_max > 0:
            level, count = struct.unpack_from(">HH", inode.fork)
            if 0 < level <= TREE_LEVELS_MAX and 0 < count <= places_max:
                blocks = struct.unpack_from(f">{count}Q", inode.fork, 4 + 8 * places_max)
                return [(level - 1, block) for block in blocks]
        raise UnresolvedError(f"XFS: inode {inode.number} has a damaged root of its extents")

    # Directories and links ----------------------------------------------------------------------

    def _entries(self, inode: Inode) -> Iterator[tuple[bytes, int]]:
        if inode.format == FORMAT_LOCAL:
            yield from self._short_entries(inode)
            return
        for place, data in self._directory_blocks(inode):
            yield from self._block_entries(inode, place, data)

    def _short_entries(self, inode: Inode) -> Iterator[tuple[bytes, int]]:
        """Yield what a directory within its inode holds; `inode.size` bytes of the fork."""
        fork = inode.fork[: inode.size]
        damaged = UnresolvedError(f"XFS: directory {inode.number} is damaged")
        if len(fork) < max(6, inode.size):
            raise damaged
        count, wide_count = fork[0], fork[1]
        width = 8 if wide_count else 4
        at = 2 + width
        typed = 1 if self._superblock.has_types else 0
        for _ in range(count):
            if at + 3 > len(fork):
                raise damaged
            length = fork[at]
            number_at = at + 3 + length + typed
            if length == 0 or number_at + width > len(fork):
                raise damaged
            name = fork[at + 3 : at + 3 + length]
            yield name, int.from_bytes(fork[number_at : number_at + width], "big")
            at = number_at + width
        if at != len(fork):
            raise damaged

    def _directory_blocks(self, inode: Inode) -> Iterator[tuple[int, bytes]]:
        """Yield (place, content) of a directory's blocks that hold names."""
        superblock = self._superblock
        disk = self._settled()
        shift = superblock.block_log
        size = superblock.directory_block_size
        pieces: list[bytes] = []
        begun: tuple[int, int] | None = None  # (offset, place) of a block whose pieces come
        for extent in self._extents(inode):
            if extent.offset << shift >= _DIRECTORY_LEAVES_AT:
                break
            place = superblock.place(extent.block, extent.length, what=f"inode {inode.number}")
            if extent.is_unwritten or (extent.offset + extent.length) << shift > inode.size:
                raise UnresolvedError(f"XFS: directory {inode.number} has impossible extents")
            for i in range(extent.length):
                offset = (extent.offset + i) << shift
                if begun is None:
                    begun = (offset, place + (i << shift))
                if offset != begun[0] + (len(pieces) << shift) or begun[0] % size:
                    raise UnresolvedError(f"XFS: directory {inode.number} has parts of blocks")
                pieces.append(
                    read_exactly(disk, offset=place + (i << shift), length=superblock.block_size)
                )
                if len(pieces) << shift == size:
                    yield begun[1], b"".join(pieces)
                    pieces.clear()
                    begun = None
        if begun is not None:
            raise UnresolvedError(f"XFS: directory {inode.number} has parts of blocks")

    def _block_entries(self, inode: Inode, place: int, data: bytes) -> Iterator[tuple[bytes, int]]:
        magic, address, own_uuid, owner = _DIRECTORY_HEADER.unpack_from(data)
        damaged = UnresolvedError(f"XFS: directory {inode.number}: damaged block at byte {place}")
        if (
            magic not in {b"XDD3", b"XDB3"}
            or address * 512 != place
            or own_uuid != self._superblock.meta_uuid
            or owner != inode.number
            or not has_checksum(data, 4)
        ):
            raise damaged
        end = len(data)
        if magic == b"XDB3":
            # The only block: its hash index and the size of that are at its end.
            index_count = int.from_bytes(data[-8:-4], "big")
            end -= 8 + 8 * index_count
            if inode.size != len(data) or end < _DIRECTORY_HEADER.size:
                raise damaged
        typed = 1 if self._superblock.has_types else 0
        at = _DIRECTORY_HEADER.size
        while at < end:
            if at + 8 > end:
                raise damaged
            if data[at : at + 2] == b"\xff\xff":
                length = int.from_bytes(data[at + 2 : at + 4], "big")
            else:
                name_length = data[at + 8] if at + 8 < end else 0
                length = (9 + name_length + typed + 2 + 7) & ~7
                if name_length == 0 or at + length > end:
                    raise damaged
                number = int.from_bytes(data[at : at + 8], "big")
                yield data[at + 9 : at + 9 + name_length], number
            tag_at = at + length - 2
            if (
                length < 8
                or at + length > end
                or data[tag_at : tag_at + 2] != at.to_bytes(2, "big")
            ):
                raise damaged
            at += length

    def _target(self, inode: Inode) -> bytes:
        """Return what a symbolic link leads to."""
        damaged = UnresolvedError(f"XFS: link {inode.number} is damaged")
        if not 0 < inode.size <= _SYMLINK_BYTES_MAX:
            raise damaged
        if inode.format == FORMAT_LOCAL:
            target = inode.fork[: inode.size]
        else:
            target = b"".join(self._target_pieces(inode))
        if len(target) != inode.size:
            raise damaged
        return target

    def _target_pieces(self, inode: Inode) -> Iterable[bytes]:
        superblock = self._superblock
        header = _SYMLINK_HEADER.size
        done = 0
        for extent in self._extents(inode):
            place = superblock.place(extent.block, extent.length, what=f"inode {inode.number}")
            if extent.length > _SYMLINK_BYTES_MAX * 2 // superblock.block_size + 1:
                raise UnresolvedError(f"XFS: link {inode.number} is damaged")
            data = read_exactly(
                self._settled(), offset=place, length=extent.length << superblock.block_log
            )
            magic, offset, length, _, own_uuid, owner, address, _ = _SYMLINK_HEADER.unpack_from(
                data
            )
            if (
                magic != b"XSLM"
                or offset != done
                or length > len(data) - header
                or own_uuid != superblock.meta_uuid
                or owner != inode.number
                or address * 512 != place
                or not has_checksum(data, 12)
            ):
                raise UnresolvedError(f"XFS: link {inode.number} is damaged")
            done += length
            yield data[header : header + length]

    # Free space ---------------------------------------------------------------------------------

    def _free_of(self, ag: int) -> Iterator[Extent]:
        """Yield the free extents of a group; raise if they are not what its header says."""
        superblock = self._superblock
        disk = self._settled()
        start = ag * superblock.ag_blocks * superblock.block_size
        what = f"free space of group {ag}"
        header = read_exactly(
            disk, offset=start + superblock.sector_size, length=superblock.sector_size
        )
        require_checksum(header, _AGF_CHECKSUM_AT, what=what)
        magic, version, own_ag, length, root, level, list_count, free_count, own_uuid = (
            _AGF.unpack_from(header)
        )
        if (
            magic != b"XAGF"
            or version != 1
            or own_ag != ag
            or length != superblock.ag_length(ag)
            or own_uuid != superblock.meta_uuid
            or not 0 < level <= TREE_LEVELS_MAX
            or list_count > length
        ):
            raise UnresolvedError(f"XFS: {what}: the header is not understood")
        end = self._header_blocks
        total = 0
        for records in tree_leaves(
            disk, superblock, [(level - 1, root)], is_long=False, owner=ag, what=what
        ):
            for block, count in struct.iter_unpack(">II", records):
                if block < end or count == 0 or block + count > length:
                    raise UnresolvedError(f"XFS: {what}: out of order")
                end = block + count
                total += count
                yield (
                    start + block * superblock.block_size,
                    start + end * superblock.block_size,
                )
        if total != free_count:
            raise UnresolvedError(f"XFS: {what}: {free_count} blocks, but its tree has {total}")
