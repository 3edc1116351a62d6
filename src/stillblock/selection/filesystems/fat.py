"""FAT12, FAT16 and FAT32: files by walking the directories, each cluster claimed once.

There is no journal, and there are no checksums: what a crash leaves is what lies there. What stands
in for them: the copies of the table agree, and every chain that a directory gives is whole, ends
and is no one else's. Nothing is left out of a filesystem where one of that is not so.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from stillblock.extents import normalise
from stillblock.model import Extent, Extents
from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.allocation import Claims
from stillblock.selection.filesystems.cache import CachedDisk
from stillblock.selection.filesystems.damage import Verdict, damage_is_unresolved
from stillblock.selection.filesystems.dos_time import seconds_of
from stillblock.selection.filesystems.fat_table import Table, parse_boot_sector
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
from stillblock.selection.filesystems.names import checked_name, text_of_utf16

_DIRECTORY_BYTES_MAX: Final = 65536 * 32
_ROOT_NUMBER: Final = 0
_ENTRY_BYTES: Final = 32
_END, _DELETED, _IS_E5 = 0x00, 0xE5, 0x05
_LABEL, _DIRECTORY, _LONG_NAME, _LONG_NAME_MASK = 0x08, 0x10, 0x0F, 0x3F
_LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10
_LONG_NAME_PARTS_MAX: Final = 20
_FORBIDDEN: Final = frozenset(b'"*+,/:;<=>?[\\]|\x7f') | frozenset(range(32))
"""What no short name has."""


class Entry(NamedTuple):
    """A file or directory, as its short entry has it."""

    place: int
    """Where the short entry lies; 0 stands for the root directory."""
    name: str
    attributes: int
    cluster: int
    """0 if there is no data."""
    size: int
    modified_ns: int

    @property
    def is_directory(self) -> bool:
        """Whether it holds other entries."""
        return bool(self.attributes & _DIRECTORY)


def open_fat(disk: Disk) -> "Fat":
    """Return the FAT filesystem on a disk or partition."""
    with damage_is_unresolved("FAT"):
        return Fat(CachedDisk(disk))


class Fat:
    """A FAT filesystem. `Filesystem` says what its methods promise."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        if disk.size < 512:
            raise UnresolvedError("it is too small for FAT")
        self._boot = parse_boot_sector(read_exactly(disk, offset=0, length=512))
        if self._boot.size > disk.size:
            raise UnresolvedError(
                f"FAT says that it has {self._boot.size} bytes, and {disk.size} are there"
            )
        self._table = Table(disk, self._boot.table)
        self._metadata = Verdict(self._find_metadata)
        serial = self._boot.serial
        self._identity = Identity(
            kind=f"fat{self._boot.bits}",
            label=self._label(),
            uuid=f"{serial >> 16:04X}-{serial & 0xFFFF:04X}" if serial else "",
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

    def _label(self) -> str:
        """Return the label in the root directory, which counts before that in the boot sector."""
        for _, raw in self._slots(_ROOT_NUMBER, 0):
            if raw[0] == _END:
                break
            is_label = raw[11] & (_LABEL | _DIRECTORY) == _LABEL
            if raw[0] != _DELETED and is_label and raw[11] & _LONG_NAME_MASK != _LONG_NAME:
                return raw[:11].decode("cp437").rstrip()
        label = self._boot.label.decode("cp437").rstrip()
        return "" if label == "NO NAME" else label

    # Directories --------------------------------------------------------------------------------

    def root(self) -> Node:
        """Return the top directory."""
        return Node(number=_ROOT_NUMBER, kind=FileKind.DIRECTORY, size=0)

    def children(self, directory: Node) -> Iterator[tuple[str, Node]]:
        """Yield the names in a directory, and what they lead to."""
        with damage_is_unresolved("FAT"):
            cluster = self._entry_of(directory).cluster if directory.number else 0
            for entry in self._entries(directory.number, cluster):
                yield entry.name, _node(entry)

    def _entry_of(self, node: Node) -> Entry:
        place = node.number
        if place % _ENTRY_BYTES or not self._boot.table.offset < place < self._boot.size:
            raise UnresolvedError(f"there is no directory entry at {place}")
        raw = read_exactly(self._disk, offset=place, length=_ENTRY_BYTES)
        return self._parse(raw, place, "")

    def _slots(self, number: int, cluster: int) -> Iterator[tuple[int, bytes]]:
        """Yield the places and bytes of a directory's slots, used or not."""
        boot = self._boot
        pieces: Iterator[Extent] | list[Extent]
        if number == _ROOT_NUMBER and boot.bits != 32:
            pieces = [(boot.root_offset, boot.root_offset + boot.root_size)]
        else:
            pieces = self._extents(boot.root_cluster if number == _ROOT_NUMBER else cluster)
        total = 0
        for begin, end in pieces:
            total += end - begin
            if total > _DIRECTORY_BYTES_MAX:
                raise UnresolvedError("a directory is larger than FAT allows: it is damaged")
            data = read_exactly(self._disk, offset=begin, length=end - begin)
            for at in range(0, len(data), _ENTRY_BYTES):
                yield begin + at, data[at : at + _ENTRY_BYTES]

    def _entries(self, number: int, cluster: int) -> Iterator[Entry]:
        """Yield what a directory holds, without labels and the entries for itself and above."""
        long_name: list[bytes] = []
        for index, (place, raw) in enumerate(self._slots(number, cluster)):
            first = raw[0]
            if first == _END:
                return
            if first == _DELETED:
                long_name = []
                continue
            attributes = raw[11]
            if attributes & _LONG_NAME_MASK == _LONG_NAME:
                long_name.append(raw)
                continue
            parts, long_name = long_name, []
            if attributes & (_LABEL | _DIRECTORY) == _LABEL:
                continue
            if index < 2 and number != _ROOT_NUMBER and raw[:11].rstrip() in (b".", b".."):
                continue
            entry = self._parse(raw, place, _join_long_name(parts, raw[:11]))
            yield entry._replace(name=checked_name(entry.name))

    def _parse(self, raw: bytes, place: int, long_name: str) -> Entry:
        attributes = raw[11]
        cluster = int.from_bytes(raw[26:28], "little")
        if self._boot.bits == 32:
            cluster |= int.from_bytes(raw[20:22], "little") << 16
        size = int.from_bytes(raw[28:32], "little")
        what = f"the directory entry at {place}"
        if raw[0] in (_END, _DELETED) or attributes & 0xC0 or attributes & _LABEL:
            raise UnresolvedError(f"{what} is damaged")
        if attributes & _DIRECTORY:
            if size or not cluster:
                raise UnresolvedError(f"{what} is damaged")
        elif bool(cluster) < bool(size):
            raise UnresolvedError(f"{what} has a size and no data: it is damaged")
        return Entry(
            place, long_name or _short_name(raw), attributes, cluster, size, _modified_ns(raw)
        )

    # Data ---------------------------------------------------------------------------------------

    def _extents(self, cluster: int) -> Iterator[Extent]:
        """Yield where a chain lies, in its order."""
        for first, count in self._table.chain(cluster):
            begin = self._boot.place(first)
            yield begin, begin + count * self._boot.cluster_size

    def runs(self, node: Node) -> tuple[Run, ...]:
        """Return where a file's data lies, to the end of its chain."""
        with damage_is_unresolved("FAT"):
            self._metadata()
            return self._runs(self._entry_of(node))

    def _runs(self, entry: Entry) -> tuple[Run, ...]:
        if entry.is_directory:
            raise UnresolvedError("it is a directory")
        found: list[Run] = []
        offset = 0
        if entry.cluster:
            for begin, end in self._extents(entry.cluster):
                found.append(Run(offset, end - begin, begin))
                offset += end - begin
        if offset < entry.size:
            raise UnresolvedError(
                f"a file of {entry.size} bytes has clusters for {offset}: it is damaged"
            )
        return tuple(found)

    def layout(self, node: Node) -> Layout:
        """Return where a file's bytes are."""
        return laid_out(self.runs(node), size=node.size)

    def read(self, node: Node, *, offset: int, length: int) -> bytes:
        """Return data of a regular file, short at its end."""
        with damage_is_unresolved("FAT"):
            entry = self._entry_of(node)
            return read_runs(
                self._disk, self._runs(entry), size=entry.size, offset=offset, length=length
            )

    # Space --------------------------------------------------------------------------------------

    def free(self) -> Extents:
        """Return the clusters that every copy of the table says are free."""
        with damage_is_unresolved("FAT"):
            self._metadata()
            return tuple(
                (self._boot.place(begin), self._boot.place(end))
                for begin, end in self._table.free_runs()
            )

    def fixed(self) -> Extents:
        """Return all before the first cluster, and the directories."""
        with damage_is_unresolved("FAT"):
            return self._metadata()

    def _find_metadata(self) -> Extents:
        """Return what is no file's data, after checking that every cluster is claimed once.

        A chain that meets a free cluster raises, so what is claimed is allocated.
        """
        boot = self._boot
        claims = Claims(boot.cluster_count, what="FAT")
        metadata: list[Extent] = [(0, boot.data_offset)]

        def claim(cluster: int, who: str) -> list[Extent]:
            extents = list(self._extents(cluster))
            for begin, end in extents:
                first = (begin - boot.data_offset) // boot.cluster_size
                claims.claim(first, (end - begin) // boot.cluster_size, who)
            return extents

        pending = [(_ROOT_NUMBER, 0)]
        if boot.bits == 32:
            metadata += claim(boot.root_cluster, "the root directory")
        while pending:
            number, cluster = pending.pop()
            names: set[str] = set()
            for entry in self._entries(number, cluster):
                if (name := entry.name.casefold()) in names:
                    raise UnresolvedError(f"a directory has {entry.name!r} twice: it is damaged")
                names.add(name)
                if not entry.cluster:
                    continue
                extents = claim(entry.cluster, f"{entry.name!r}")
                if entry.is_directory:
                    metadata += extents
                    pending.append((entry.place, entry.cluster))
                elif sum(end - begin for begin, end in extents) < entry.size:
                    raise UnresolvedError(f"{entry.name!r} is longer than its chain: it is damaged")
        return normalise(metadata)


def _node(entry: Entry) -> Node:
    return Node(
        number=entry.place,
        kind=FileKind.DIRECTORY if entry.is_directory else FileKind.REGULAR,
        size=entry.size,
        modified_ns=entry.modified_ns,
    )


def _join_long_name(parts: list[bytes], short: bytes) -> str:
    """Return the long name that stands before a short entry; empty if it is another one's.

    Systems that know short names only leave long names of removed files behind: a checksum of the
    short name, and a number each, tell.
    """
    if not 0 < len(parts) <= _LONG_NAME_PARTS_MAX:
        return ""
    checksum = 0
    for byte in short:
        checksum = ((checksum >> 1) + ((checksum & 1) << 7) + byte) & 0xFF
    name = b""
    for index, part in enumerate(reversed(parts), start=1):
        order = index | (0x40 if index == len(parts) else 0)
        if part[0] != order or part[13] != checksum or part[12] or part[26:28] != b"\0\0":
            return ""
        name += part[1:11] + part[14:26] + part[28:32]
    for at in range(0, len(name), 2):
        if name[at : at + 2] == b"\0\0":
            name = name[:at]
            break
    return text_of_utf16(name)


def _short_name(raw: bytes) -> str:
    """Return an 8.3 name, small where its entry says so."""
    stored = (b"\xe5" if raw[0] == _IS_E5 else raw[:1]) + raw[1:11]
    if raw[0] == 0x20 or not _FORBIDDEN.isdisjoint(stored):
        raise UnresolvedError(f"a directory has the impossible name {stored!r}: it is damaged")
    # The code page is not on the disk; 437 is what systems take that were not told.
    base, extension = (part.decode("cp437").rstrip() for part in (stored[:8], stored[8:]))
    base = base.lower() if raw[12] & _LOWER_BASE else base
    extension = extension.lower() if raw[12] & _LOWER_EXTENSION else extension
    return f"{base}.{extension}" if extension else base


def _modified_ns(raw: bytes) -> int:
    """Return the time of the last change, as if local time were UTC; 0 if there is none."""
    return (seconds_of(int.from_bytes(raw[22:26], "little")) or 0) * 1_000_000_000
