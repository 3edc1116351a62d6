"""ext2, ext3 and ext4: files, free space and fixed metadata, with the journal applied in memory.

Whoever lies on a disk that was in use when it was frozen: ext3 and ext4 have put what matters into
their journal, and reading goes through it (`ext_journal`). A filesystem without a journal that was
not unmounted is not settled, and is refused.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from stillblock.extents import normalise, whole
from stillblock.model import Extent, Extents
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems.cache import CachedDisk
from stillblock.selection.filesystems.damage import Verdict, damage_is_unresolved
from stillblock.selection.filesystems.ext_claims import check_claims
from stillblock.selection.filesystems.ext_directory import DirectoryBlocks
from stillblock.selection.filesystems.ext_groups import Groups
from stillblock.selection.filesystems.ext_inode import (
    BlockMap,
    Flag,
    Inode,
    has_blocks,
    inline_tail,
    parse_inode,
)
from stillblock.selection.filesystems.ext_journal import JournalDisk, apply_journal
from stillblock.selection.filesystems.ext_superblock import (
    Compat,
    Incompat,
    Superblock,
    read_superblock,
)
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

_ROOT: Final = 2
_INLINE_BYTES: Final = 60
_RECENT_COUNT_MAX: Final = 4096
_LINK_BYTES_MAX: Final = 65536
_COMPRESSED: Final = Flag.COMPRESSED | Flag.DIRTY | Flag.COMPRESSED_BLOCKS


def open_ext(disk: Disk) -> "ExtFilesystem":
    """Return the ext2, ext3 or ext4 filesystem on a disk that stands still.

    Raise `UnresolvedError` if it is damaged, not settled, or has features that are not understood.
    """
    cached = CachedDisk(disk)
    with damage_is_unresolved("the filesystem"):
        superblock = read_superblock(cached)
        if Compat.HAS_JOURNAL not in superblock.compat:
            if Incompat.RECOVER in superblock.incompat:
                raise UnresolvedError("it has a journal to replay, and says that it has none")
            if not superblock.is_clean:
                raise UnresolvedError(
                    "it was mounted or not unmounted, and has no journal that tells what is in "
                    "place"
                )
            return ExtFilesystem(cached, superblock, caveats=())
        overlay = apply_journal(cached, superblock)
        superblock = read_superblock(overlay.disk)
        return ExtFilesystem(overlay.disk, superblock, caveats=overlay.caveats)


class ExtFilesystem:
    """A reader of one ext2, ext3 or ext4 filesystem; see `Filesystem` for what each method does."""

    def __init__(self, disk: Disk, superblock: Superblock, *, caveats: tuple[str, ...]) -> None:
        """Read the group descriptors; `disk` has the journal applied."""
        if superblock.has_errors:
            raise UnresolvedError("it is marked as having errors; check it with e2fsck")
        self._disk = disk
        self._superblock = superblock
        self._caveats = caveats
        self._groups = Groups(disk, superblock)
        self._map = BlockMap(disk, superblock)
        self._recent: dict[int, Inode] = {}
        self._fixed = Verdict(self._find_fixed)
        self._check_claims = Verdict(self._find_claims)

    @property
    def identity(self) -> Identity:
        """Which one it is."""
        superblock = self._superblock
        return Identity(
            kind=superblock.kind,
            label=superblock.label,
            uuid=superblock.uuid,
            block_size=superblock.block_size,
            size=superblock.block_count * superblock.block_size,
            is_case_sensitive=Incompat.CASEFOLD not in superblock.incompat,
        )

    @property
    def caveats(self) -> tuple[str, ...]:
        """Whether a journal was applied in memory."""
        return self._caveats

    def root(self) -> Node:
        """Return the top directory."""
        root = self._inode(_ROOT).node
        if root.kind is not FileKind.DIRECTORY:
            raise UnresolvedError("inode 2 is damaged: the top directory is none")
        return root

    def children(self, directory: Node) -> Iterable[tuple[str, Node]]:
        """Yield the names in a directory and what they lead to."""
        with damage_is_unresolved(f"directory {directory.number}"):
            for name, number, kind in self._entries(self._again(directory)):
                node = self._inode(number).node
                if node.links == 0:
                    raise UnresolvedError(
                        f"directory {directory.number} is damaged: {name!r} leads to inode "
                        f"{number}, which is not in use"
                    )
                if kind is not None and kind is not node.kind:
                    raise UnresolvedError(
                        f"directory {directory.number} is damaged: {name!r} should be a {kind}, "
                        f"inode {number} is a {node.kind}"
                    )
                yield name, node

    def runs(self, node: Node) -> tuple[Run, ...]:
        """Return where a regular file's data lies."""
        inode = self._again(node)
        if inode.flags & _COMPRESSED:
            raise UnresolvedError(f"inode {node.number} is compressed")
        if inode.flags & (Flag.ENCRYPTED | Flag.VERITY | Flag.SNAPSHOT):
            raise UnresolvedError(f"inode {node.number} is encrypted, sealed or a snapshot file")
        with damage_is_unresolved(f"inode {node.number}"):
            if inode.has_inline_data:
                self._inline(inode)
                return ()
            if node.kind is not FileKind.REGULAR:
                return ()
            self._check_claims()
            return self._map.runs(inode)

    def layout(self, node: Node) -> Layout:
        """Return where a regular file's bytes are; journalled data is the reader's to give."""
        runs = self.runs(node)
        inode = self._again(node)
        if inode.has_inline_data:
            return Layout(by_reader=whole(node.size))
        found = laid_out(runs, size=node.size)
        if not isinstance(self._disk, JournalDisk):
            return found
        by_reader: list[Extent] = []
        for run in found.runs:
            if run.start is None or run.is_unwritten:
                continue
            for start, end in self._disk.journalled(run.start, run.start + run.length):
                by_reader.append((start - run.start + run.offset, end - run.start + run.offset))
        return found._replace(by_reader=normalise(by_reader))

    def read(self, node: Node, *, offset: int, length: int) -> bytes:
        """Return data of a regular file, or the target of a link."""
        inode = self._again(node)
        if inode.flags & (_COMPRESSED | Flag.ENCRYPTED):
            raise UnresolvedError(f"inode {node.number} is compressed or encrypted")
        if node.kind is FileKind.SYMLINK and node.size > _LINK_BYTES_MAX:
            raise UnresolvedError(f"link {node.number} is damaged: {node.size} bytes long")
        with damage_is_unresolved(f"inode {node.number}"):
            if inode.has_inline_data:
                return self._inline(inode)[offset : offset + length]
            if node.kind is FileKind.SYMLINK and not has_blocks(inode):
                return inode.body[: node.size][offset : offset + length]
            runs = self._map.runs(inode)
            return read_runs(self._disk, runs, size=node.size, offset=offset, length=length)

    def free(self) -> Extents:
        """Return the blocks that no bitmap has in use."""
        with damage_is_unresolved("a block bitmap"):
            self._check_claims()
            return self._groups.free()

    def fixed(self) -> Extents:
        """Return the tables of all groups, the journal, and the files without a name."""
        with damage_is_unresolved("a file without a name"):
            return self._fixed()

    def _find_claims(self) -> None:
        if not self._superblock.has_checksums:
            check_claims(self._disk, self._superblock, self._groups)

    def _find_fixed(self) -> Extents:
        superblock = self._superblock
        extents: list[Extent] = list(self._groups.fixed)
        numbers = list(superblock.hidden_inodes)
        if superblock.journal_inode and Compat.HAS_JOURNAL in superblock.compat:
            numbers.append(superblock.journal_inode)
        for number in numbers:
            inode = self._inode(number)
            runs, tree = self._map.follow(inode)
            size = superblock.block_size
            extents += [(block * size, (block + 1) * size) for block in tree]
            for run in runs:
                if run.start is not None:
                    extents.append((run.start, run.start + run.length))
        if superblock.mmp_block:
            start = superblock.mmp_block * superblock.block_size
            extents.append((start, start + superblock.block_size))
        return normalise(extents)

    # Inodes -----------------------------------------------------------------------------------

    def _inode(self, number: int) -> Inode:
        inode = self._recent.get(number)
        if inode is None:
            place = self._groups.inode_offset(number)
            raw = self._disk.pread(offset=place, length=self._superblock.inode_size)
            inode = parse_inode(number, raw, self._superblock)
            if len(self._recent) >= _RECENT_COUNT_MAX:
                self._recent.clear()
            self._recent[number] = inode
        return inode

    def _again(self, node: Node) -> Inode:
        inode = self._inode(node.number)
        if inode.node.generation != node.generation:
            raise UnresolvedError(f"inode {node.number} is another file by now")
        return inode

    def _inline(self, inode: Inode) -> bytes:
        size = inode.node.size
        data = inode.body if size <= _INLINE_BYTES else inode.body + inline_tail(inode)
        if size > len(data):
            raise UnresolvedError(f"inode {inode.node.number} is damaged: its data is cut off")
        return data[:size]

    # Directories ------------------------------------------------------------------------------

    def _entries(self, inode: Inode) -> Iterator[tuple[str, int, FileKind | None]]:
        if inode.node.kind is not FileKind.DIRECTORY:
            raise UnresolvedError(f"inode {inode.node.number} is no directory")
        blocks = DirectoryBlocks(inode, self._superblock)
        if inode.has_inline_data:
            yield from self._inline_entries(inode, blocks)
            return
        size, block_size = inode.node.size, self._superblock.block_size
        if size == 0 or size % block_size:
            raise UnresolvedError(f"directory {inode.node.number} is damaged: {size} bytes long")
        position = 0
        for run in self._map.runs(inode):
            if run.start is None or run.is_unwritten or run.offset != position:
                break
            for begin in range(0, min(run.length, size - position), block_size):
                block = self._disk.pread(offset=run.start + begin, length=block_size)
                yield from blocks.entries(block, index=(position + begin) // block_size)
            position += run.length
        if position < size:
            raise UnresolvedError(f"directory {inode.node.number} is damaged: a piece is missing")

    def _inline_entries(
        self, inode: Inode, blocks: DirectoryBlocks
    ) -> Iterator[tuple[str, int, FileKind | None]]:
        """Yield what a directory inside its inode holds: 4 bytes of parent, then entries.

        What did not fit the first 60 bytes goes on in an attribute, with entries of its own.
        """
        data = self._inline(inode)
        if len(data) < _INLINE_BYTES:
            raise UnresolvedError(f"directory {inode.node.number} is damaged: it is cut off")
        yield from blocks.parse(data, begin=4, end=_INLINE_BYTES, is_first=False)
        if len(data) > _INLINE_BYTES:
            yield from blocks.parse(data, begin=_INLINE_BYTES, end=len(data), is_first=False)
