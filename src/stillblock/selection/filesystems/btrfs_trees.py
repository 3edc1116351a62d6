"""Search and scan of the trees of btrfs, with a memory of the blocks read last."""

import struct
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final, NamedTuple

from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.btrfs_format import (
    CHUNK_ITEM,
    CHUNK_TREE_OBJECTS,
    CHUNKS_MAX,
    DEVICE_ITEM,
    DEVICE_ITEMS,
    Block,
    Chunk,
    ChunkMap,
    Item,
    Key,
    Superblock,
    parse_block,
    parse_chunk,
)
from stillblock.selection.filesystems.btrfs_items import ROOT_ITEM
from stillblock.selection.filesystems.filesystem import UnresolvedError

_LEVELS_MAX: Final = 8
_CACHE_BYTES: Final = 4 << 20
"""Of blocks as they lie on the disk; their items as Python holds them are three times that."""

_ROOT: Final = struct.Struct("<160xQQQ8x8x8xQI17xBB")
"""Generation, root directory, address, flags, references, drop level, level."""
_KEY_MAX: Final = (1 << 64) - 1


class Root(NamedTuple):
    """Where a tree begins."""

    address: int
    level: int
    generation: int
    directory: int = 0
    """Inode of the top directory, of a tree of files."""
    references: int = 1
    """0: being deleted, nobody's any more."""


class Trees:
    """The trees of one filesystem, as of its last commit."""

    def __init__(self, disk: Disk, superblock: Superblock) -> None:
        self._disk = disk
        self._superblock = superblock
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._blocks_max = max(16, _CACHE_BYTES // superblock.node_size)
        self.map = ChunkMap(list(superblock.system_chunks))
        self.map = self._all_chunks()
        self._blocks.clear()
        self._root_tree: Final = Root(superblock.root, superblock.root_level, superblock.generation)

    def root(self, tree: int) -> Root:
        """Return the root of a tree by its object id; raise if there is none."""
        found = None
        for item, value in self.scan(self._root_tree, (tree, ROOT_ITEM, 0)):
            if item[:2] != (tree, ROOT_ITEM):
                break
            found = self.parse_root(value)
        if found is None:
            raise UnresolvedError(f"btrfs: there is no tree {tree}")
        return found

    @staticmethod
    def parse_root(value: bytes) -> Root:
        """Return the root that an item tells."""
        if len(value) < _ROOT.size:
            raise UnresolvedError("btrfs: a tree has a damaged root")
        generation, directory, address, _flags, references, _, level = _ROOT.unpack_from(value)
        return Root(address, level, generation, directory, references)

    def get(self, root: Root, key: Key) -> bytes | None:
        """Return the value of a key."""
        for item, value in self.scan(root, key):
            return value if item[:3] == key else None
        return None

    def in_root_tree(self, key: Key) -> bytes | None:
        """Return the value of a key of the tree of trees."""
        return self.get(self._root_tree, key)

    def scan(self, root: Root, first: Key) -> Iterator[tuple[Item, bytes]]:
        """Yield items and their data from the first that is not below a key, in order."""
        for leaf in self.leaves(root, first):
            begin = bisect_left(leaf.items, first) if leaf.items[0] < first else 0
            for i in range(begin, len(leaf.items)):
                item = leaf.items[i]
                yield item, leaf.value(item)

    def leaves(
        self, root: Root, first: Key = (0, 0, 0), *, blocks: list[int] | None = None
    ) -> Iterator[Block]:
        """Yield the leaves that may hold keys from `first` on, in order; none is empty.

        The addresses of all blocks on the way are added to `blocks`.
        """
        blocks = [] if blocks is None else blocks
        blocks.append(root.address)
        block = self._block(root.address, level=root.level, generation=root.generation)
        if not block.items:
            return
        path: list[tuple[Block, int]] = []
        end: Key = (_KEY_MAX, 256, 0)
        ends: list[Key] = [end]
        while True:
            if block.level == 0:
                yield block
                while path and path[-1][1] + 1 >= len(path[-1][0].items):
                    path.pop()
                    ends.pop()
                if not path:
                    return
                parent, i = path.pop()
                ends.pop()
                i += 1
            else:
                parent, i = (
                    block,
                    max(0, bisect_right(block.items, (*first, _KEY_MAX, _KEY_MAX)) - 1),
                )
            end = parent.items[i + 1][:3] if i + 1 < len(parent.items) else ends[-1]
            path.append((parent, i))
            ends.append(end)
            pointer = parent.items[i]
            blocks.append(pointer[3])
            block = self._block(pointer[3], level=parent.level - 1, generation=pointer[4])
            # A block begins with the key that its parent has for it and ends before the next one's.
            if not block.items or block.items[0][:3] != pointer[:3] or block.items[-1][:3] >= end:
                raise UnresolvedError(
                    f"btrfs: the tree block at address {pointer[3]} is not in order"
                )

    def _block(self, address: int, *, level: int, generation: int) -> Block:
        """Return a tree block; one of its copies must be what its parent says."""
        block = self._blocks.get(address)
        if block is None:
            block = self._read(address)
            self._blocks[address] = block
            if len(self._blocks) > self._blocks_max:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(address)
        if block.level != level or block.generation != generation or level >= _LEVELS_MAX:
            raise UnresolvedError(
                f"btrfs: the tree block at address {address} is not the expected one"
            )
        return block

    def _read(self, address: int) -> Block:
        superblock = self._superblock
        places = self.map.places(address, superblock.node_size, what="a tree block")
        for place in places:
            data = read_exactly(self._disk, offset=place, length=superblock.node_size)
            block = parse_block(superblock, address, data)
            if block is not None:
                return block
        raise UnresolvedError(f"btrfs: the tree block at address {address} is damaged")

    def _all_chunks(self) -> ChunkMap:
        """Return the map of all chunks, from the chunk tree; it must say that one device is all."""
        superblock = self._superblock
        root = Root(
            superblock.chunk_root, superblock.chunk_root_level, superblock.chunk_root_generation
        )
        chunks: list[Chunk] = []
        for item, value in self.scan(root, (0, 0, 0)):
            object_id, kind, offset = item[:3]
            if (object_id, kind) == (DEVICE_ITEMS, DEVICE_ITEM):
                if offset != superblock.device:
                    raise UnresolvedError("btrfs: lies on several devices, and one is read")
            elif (object_id, kind) == (CHUNK_TREE_OBJECTS, CHUNK_ITEM):
                if len(chunks) >= CHUNKS_MAX:
                    raise UnresolvedError(f"btrfs: has more than {CHUNKS_MAX} chunks")
                chunks.append(
                    parse_chunk(
                        offset,
                        value,
                        device=superblock.device,
                        device_uuid=superblock.device_uuid,
                        device_bytes=superblock.device_bytes,
                    )
                )
        whole = ChunkMap(chunks)
        if not set(superblock.system_chunks) <= set(whole.chunks):
            raise UnresolvedError("btrfs: the superblock and the chunk tree have different chunks")
        return whole
