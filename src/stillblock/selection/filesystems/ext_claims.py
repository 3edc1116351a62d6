"""Whether each block of an ext filesystem has one owner, for those that have no checksums.

With `metadata_csum` a damaged pointer is noticed where it lies. Without, it leads to some block
and only that block's true owner tells that it is the wrong one: here all inodes in use are asked.
"""

from typing import Final

from stillblock.extents import intersect, normalise
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems.ext_groups import Groups
from stillblock.selection.filesystems.ext_inode import (
    BlockMap,
    Inode,
    has_blocks,
    parse_inode,
)
from stillblock.selection.filesystems.ext_superblock import Superblock
from stillblock.selection.filesystems.filesystem import UnresolvedError

_CLAIM_COUNT_MAX: Final = 4_000_000
"""Pieces of all files together: some 200 MiB while they are sorted."""
_RESIZE_INODE: Final = 7
"""Has the blocks that are kept for more descriptors, which are fixed anyhow."""
_COUNT_BITS: Final = 32


def check_claims(disk: Disk, superblock: Superblock, groups: Groups) -> None:
    """Raise `UnresolvedError` if a block has two owners, or one although it is free or a table."""
    block_size = superblock.block_size
    block_map = BlockMap(disk, superblock)
    # First block << 32 | count.
    claims: list[int] = []
    shared: set[int] = set()
    for number in groups.used_inodes():
        raw = disk.pread(offset=groups.inode_offset(number), length=superblock.inode_size)
        if number == _RESIZE_INODE or (number < superblock.first_inode and not any(raw[:2])):
            continue
        inode = parse_inode(number, raw, superblock)
        if inode.attributes_block:
            # Files with the same attributes may share them.
            shared.add(inode.attributes_block)
        _claim(claims, inode, block_map, block_size)
        if len(claims) + len(shared) > _CLAIM_COUNT_MAX:
            raise UnresolvedError(
                f"it has no checksums, and more than {_CLAIM_COUNT_MAX} pieces of files to compare"
            )
    claims += [block << _COUNT_BITS | 1 for block in shared]
    claims.sort()
    _check_disjoint(claims)
    taken = normalise(_bytes(claim, block_size) for claim in claims)
    if intersect(taken, groups.fixed):
        raise UnresolvedError("it is damaged: a file lies where there are tables")
    if intersect(taken, groups.free()):
        raise UnresolvedError("it is damaged: a file has blocks that its maps call free")


def _claim(claims: list[int], inode: Inode, block_map: BlockMap, block_size: int) -> None:
    if not has_blocks(inode):
        return
    runs, tree = block_map.follow(inode)
    claims += [block << _COUNT_BITS | 1 for block in tree]
    claims += [
        run.start // block_size << _COUNT_BITS | run.length // block_size
        for run in runs
        if run.start is not None
    ]


def _check_disjoint(claims: list[int]) -> None:
    end = 0
    for claim in claims:
        start = claim >> _COUNT_BITS
        if start < end:
            raise UnresolvedError(f"it is damaged: block {start} has two owners")
        end = start + (claim & (1 << _COUNT_BITS) - 1)


def _bytes(claim: int, block_size: int) -> tuple[int, int]:
    start = (claim >> _COUNT_BITS) * block_size
    return start, start + (claim & (1 << _COUNT_BITS) - 1) * block_size
