"""exFAT: files by walking the directories, each cluster claimed once and allocated in the bitmap.

There is no journal: what a crash leaves is what lies there. Entries of directories and the boot
region have checksums; the table and the bitmap have none, so they are held against each other.
"""

from collections.abc import Iterator
from typing import Final

from stillblock.extents import normalise
from stillblock.model import Extent, Extents
from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.allocation import Claims, clear_runs
from stillblock.selection.filesystems.cache import CachedDisk
from stillblock.selection.filesystems.damage import Verdict, damage_is_unresolved
from stillblock.selection.filesystems.exfat_directory import (
    BITMAP,
    ENTRY_BYTES,
    FILE,
    LABEL,
    Allocation,
    Item,
    parse_directory,
    parse_stream,
    read_boot_region,
)
from stillblock.selection.filesystems.fat_table import FIRST_CLUSTER, Table
from stillblock.selection.filesystems.filesystem import (
    FileKind,
    Identity,
    Layout,
    Node,
    Run,
    UnresolvedError,
    add_run,
    laid_out,
    read_runs,
)

_DIRECTORY_BYTES_MAX: Final = 256 << 20
"""The specification's limit."""
_METADATA_RUNS_MAX: Final = 1_000_000
_BITMAP_PIECE: Final = 1 << 20
_ROOT_NUMBER: Final = 0


def open_exfat(disk: Disk) -> "ExFat":
    """Return the exFAT filesystem on a disk or partition."""
    with damage_is_unresolved("exFAT"):
        return ExFat(CachedDisk(disk))


class ExFat:
    """An exFAT filesystem. `Filesystem` says what its methods promise."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._boot = read_boot_region(disk)
        if self._boot.size > disk.size:
            raise UnresolvedError(
                f"exFAT says that it has {self._boot.size} bytes, and {disk.size} are there"
            )
        self._table = Table(disk, self._boot.table)
        self._metadata = Verdict(self._find_metadata)
        self._root = Allocation(self._boot.root_cluster, 0, is_contiguous=False)
        label, self._bitmap = "", Allocation(0, 0, is_contiguous=False)
        for item in self._items(self._root):
            if item.kind == LABEL:
                label = item.name
            elif item.kind == BITMAP:
                self._bitmap = item.data
        serial = self._boot.serial
        self._identity = Identity(
            kind="exfat",
            label=label,
            uuid=f"{serial >> 16:04X}-{serial & 0xFFFF:04X}",
            block_size=self._boot.cluster_size,
            size=self._boot.size,
            is_case_sensitive=False,
        )

    @property
    def identity(self) -> Identity:
        """Which one it is."""
        return self._identity

    @property
    def caveats(self) -> tuple[str, ...]:
        """Nothing: without a journal, what lies there is what a crash would leave."""
        return ()

    # Directories --------------------------------------------------------------------------------

    def root(self) -> Node:
        """Return the top directory."""
        return Node(number=_ROOT_NUMBER, kind=FileKind.DIRECTORY, size=0)

    def children(self, directory: Node) -> Iterator[tuple[str, Node]]:
        """Yield the names in a directory, and what they lead to."""
        with damage_is_unresolved("exFAT"):
            is_root = directory.number == _ROOT_NUMBER
            data = self._root if is_root else self._stream_of(directory)[0]
            for item in self._items(data):
                if item.kind == FILE:
                    yield item.name, _node(item)

    def _items(self, directory: Allocation) -> Iterator[Item]:
        return parse_directory(self._slots(directory))

    def _slots(self, directory: Allocation) -> Iterator[tuple[int, bytes]]:
        """Yield the places and bytes of a directory's slots, used or not."""
        total = 0
        for begin, end in self._extents(directory):
            total += end - begin
            if total > _DIRECTORY_BYTES_MAX:
                raise UnresolvedError("a directory is larger than exFAT allows: it is damaged")
            for cluster in range(begin, end, self._boot.cluster_size):
                data = read_exactly(self._disk, offset=cluster, length=self._boot.cluster_size)
                for at in range(0, len(data), ENTRY_BYTES):
                    yield cluster + at, data[at : at + ENTRY_BYTES]

    def _stream_of(self, node: Node) -> tuple[Allocation, int]:
        place = node.number
        if place % ENTRY_BYTES or not self._boot.heap_offset <= place < self._boot.size:
            raise UnresolvedError(f"there is no directory entry at {place}")
        return parse_stream(read_exactly(self._disk, offset=place, length=ENTRY_BYTES))

    # Data ---------------------------------------------------------------------------------------

    def _extents(self, data: Allocation) -> Iterator[Extent]:
        """Yield where something lies, in its order: all its clusters."""
        boot = self._boot
        if not data.cluster:
            return
        if data.is_contiguous:
            count = -(-data.length // boot.cluster_size)
            first = data.cluster - FIRST_CLUSTER
            if first < 0 or count <= 0 or first + count > boot.cluster_count:
                raise UnresolvedError("a file lies outside the filesystem: it is damaged")
            begin = boot.place(data.cluster)
            yield begin, begin + count * boot.cluster_size
            return
        length = 0
        for first, count in self._table.chain(data.cluster):
            begin = boot.place(first)
            length += count * boot.cluster_size
            yield begin, begin + count * boot.cluster_size
        if length < data.length:
            raise UnresolvedError(
                f"{data.length} bytes have clusters for {length} only: it is damaged"
            )

    def runs(self, node: Node) -> tuple[Run, ...]:
        """Return where a file's data lies, to the end of its chain."""
        with damage_is_unresolved("exFAT"):
            self._metadata()
            return self._runs(*self._stream_of(node))

    def _runs(self, data: Allocation, valid_length: int) -> tuple[Run, ...]:
        found: list[Run] = []
        offset = 0
        for begin, end in self._extents(data):
            length = end - begin
            written = valid_length - offset if valid_length < data.length else length
            add_run(found, offset=offset, length=length, start=begin, written=written)
            offset += length
        return tuple(found)

    def layout(self, node: Node) -> Layout:
        """Return where a file's bytes are; what was never written reads as zeros."""
        return laid_out(self.runs(node), size=node.size)

    def read(self, node: Node, *, offset: int, length: int) -> bytes:
        """Return data of a regular file, short at its end."""
        with damage_is_unresolved("exFAT"):
            data, valid_length = self._stream_of(node)
            runs = self._runs(data, valid_length)
            return read_runs(self._disk, runs, size=data.length, offset=offset, length=length)

    # Space --------------------------------------------------------------------------------------

    def free(self) -> Extents:
        """Return what the bitmap has not allocated; that nobody claims it was checked."""
        with damage_is_unresolved("exFAT"):
            self._metadata()
            first = self._boot.heap_offset
            size = self._boot.cluster_size
            runs = clear_runs(self._bitmap_pieces(), count=self._boot.cluster_count)
            return tuple((first + begin * size, first + end * size) for begin, end in runs)

    def fixed(self) -> Extents:
        """Return all before the first cluster, the bitmap, the up-case table and directories."""
        with damage_is_unresolved("exFAT"):
            return self._metadata()

    def _bitmap_pieces(self) -> Iterator[bytes]:
        if self._bitmap.length * 8 < self._boot.cluster_count:
            raise UnresolvedError("its bitmap is missing or too short: it is damaged")
        left = self._bitmap.length
        for begin, end in self._extents(self._bitmap):
            for offset in range(begin, min(end, begin + left), _BITMAP_PIECE):
                length = min(_BITMAP_PIECE, end - offset, begin + left - offset)
                yield read_exactly(self._disk, offset=offset, length=length)
            left -= min(left, end - begin)

    def _find_metadata(self) -> Extents:
        """Return what is no file's data, after checking that what is claimed is claimed once."""
        boot = self._boot
        claims = Claims(boot.cluster_count, what="exFAT")
        metadata: list[Extent] = [(0, boot.heap_offset)]

        def claim(data: Allocation, who: str) -> list[Extent]:
            extents: list[Extent] = []
            for begin, end in self._extents(data):
                first = (begin - boot.heap_offset) // boot.cluster_size
                claims.claim(first, (end - begin) // boot.cluster_size, who)
                extents.append((begin, end))
            return extents

        metadata += claim(self._root, "the root directory")
        pending = [self._root]
        while pending:
            names: set[str] = set()
            for item in self._items(pending.pop()):
                extents = claim(item.data, f"{item.name!r}")
                if item.is_directory or item.kind != FILE:
                    metadata += extents
                for other in item.others:
                    metadata += claim(other, f"something of {item.name!r}")
                if item.is_directory:
                    if item.valid_length != item.data.length or not item.data.cluster:
                        raise UnresolvedError(f"the directory {item.name!r} is damaged")
                    pending.append(item.data)
                name = item.name.casefold()
                if item.kind == FILE and name in names:
                    raise UnresolvedError(f"a directory has {item.name!r} twice: it is damaged")
                names.add(name)
                if len(metadata) > _METADATA_RUNS_MAX:
                    raise UnresolvedError("its metadata lies in too many pieces to tell")
        claims.check_allocated(self._bitmap_pieces())
        return normalise(metadata)


def _node(item: Item) -> Node:
    return Node(
        number=item.place,
        kind=FileKind.DIRECTORY if item.is_directory else FileKind.REGULAR,
        size=0 if item.is_directory else item.data.length,
        modified_ns=item.modified_ns,
    )
