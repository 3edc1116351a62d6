"""NTFS files: records found in the MFT, put together from all their pieces."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from struct import Struct
from typing import Final

from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.filesystem import UnresolvedError
from stillblock.selection.filesystems.ntfs_records import (
    ATTRIBUTE_LIST,
    DATA,
    FILE_NAME,
    INDEX_BITMAP,
    LIST_BYTES_MAX,
    MFT,
    REFERENCE_MASK,
    REPARSE_POINT,
    STANDARD_INFORMATION,
    Attribute,
    Geometry,
    Record,
    Stream,
    join_pieces,
    parse_list,
    parse_record,
)

DOS_NAME: Final = 2
"""The namespace of an 8.3 name that stands beside a long one: no second path."""
_FILES_KEPT: Final = 64
_RECORDS_AT_ONCE: Final = 64
_BLOCKS_KEPT: Final = 128
"""8 MiB of records of 1 KiB, the usual size."""
_BITMAP_SPARE: Final = 1 << 20
"""A bitmap may be allocated ahead of the records."""
_READ_AHEAD: Final = 1 << 20
_REPARSE_BYTES_MAX: Final = 16 * 1024
"""NTFS's own limit of a reparse point."""

NAME_HEAD: Final = Struct("<Q56xBB")
"""Of a $FILE_NAME, which is the key of a directory's entry too: the directory, the length of the
name, its namespace. The name follows."""
_EPOCH_1601_100NS: Final = 116_444_736_000_000_000


@dataclass(slots=True, kw_only=True)
class File:
    """What a base record and the records that continue it hold."""

    number: int
    sequence: int
    is_directory: bool
    names: list[tuple[int, bytes]] = field(default_factory=list)
    """The reference of the directory and the UTF-16 name; without 8.3 names beside long ones."""
    changed: int = 0
    """In 100 ns since 1601."""
    pieces: dict[tuple[int, bytes], list[Attribute]] = field(default_factory=dict)
    """By type and name, all but names, times, data and the attribute list."""
    streams: dict[bytes, list[Attribute]] = field(default_factory=dict)
    """The data, by name."""

    @property
    def reference(self) -> int:
        """As directories give it."""
        return reference_of(self.number, self.sequence)

    @property
    def modified_ns(self) -> int:
        """Since 1970."""
        return unix_ns(self.changed)

    @property
    def size(self) -> int:
        """Bytes of the unnamed stream."""
        data = self.streams.get(b"")
        if data is None:
            return 0
        return len(data[0].value()) if data[0].is_resident else first_piece(data).sizes()[1]


def reference_of(number: int, sequence: int) -> int:
    """Return how other records and directories speak of a record."""
    return number | sequence << 48


def unix_ns(changed: int) -> int:
    """Return nanoseconds since 1970 for 100 ns since 1601; 0 for 0, which is no time."""
    return (changed - _EPOCH_1601_100NS) * 100 if changed else 0


def first_piece(pieces: list[Attribute]) -> Attribute:
    """Return the piece that begins at VCN 0 and has the sizes; raise if it is missing."""
    if len(pieces) == 1:
        return pieces[0]
    for piece in pieces:
        if piece.vcns()[0] == 0:
            return piece
    raise UnresolvedError("a piece of a file's runs is missing: it is damaged")


class MasterFileTable:
    """The $MFT: every record of the filesystem."""

    def __init__(self, disk: Disk, geometry: Geometry) -> None:
        self._disk = disk
        self.geometry = geometry
        self._files: dict[int, File] = {}
        self._blocks: dict[int, bytes] = {}
        self._stream = self._bootstrap()
        self.record_count = self._stream.size // geometry.record_size

    def _bootstrap(self) -> Stream:
        """Read record 0, whose runs say where the records are that may hold more of its runs."""
        geometry = self.geometry
        raw = read_exactly(
            self._disk,
            offset=geometry.mft_lcn * geometry.cluster_size,
            length=geometry.record_size,
        )
        record = parse_record(raw, number=MFT)
        attributes = record.attributes()
        known = [a for a in attributes if a.kind == DATA and not a.name]
        if len(known) != 1 or known[0].is_resident or not record.is_in_use or record.base:
            raise UnresolvedError("the $MFT's own record is damaged")
        allocated, size, initialised = known[0].sizes()
        if min(size, initialised) < geometry.record_size * 16:
            raise UnresolvedError("the $MFT is too short: it is damaged")
        runs = known[0].runs(cluster_count=geometry.cluster_count)
        cluster_size = geometry.cluster_size

        def stream_of_what_is_known() -> Stream:
            return Stream(
                self._disk,
                runs,
                cluster_size=cluster_size,
                size=min(size, initialised),
                initialised=initialised,
            )

        for listing in (a for a in attributes if a.kind == ATTRIBUTE_LIST):
            self._stream = stream_of_what_is_known()
            entries = [
                entry
                for entry in parse_list(self._list_bytes(listing))
                if entry.kind == DATA and not entry.name and entry.lowest_vcn
            ]
            for entry in sorted(entries, key=lambda entry: entry.lowest_vcn):
                # Each of them lies within what those before it describe.
                piece = self._listed(
                    self.record(entry.record & REFERENCE_MASK), record, entry.record
                )[DATA, entry.instance]
                first, _ = piece.vcns()
                if first != runs[-1].vcn + runs[-1].clusters:
                    raise UnresolvedError("a piece of the $MFT's runs is missing: it is damaged")
                runs += piece.runs(cluster_count=geometry.cluster_count)
                self._blocks.clear()
                self._stream = stream_of_what_is_known()
        if any(run.lcn is None for run in runs):
            raise UnresolvedError("the $MFT has holes: it is damaged")
        if (runs[-1].vcn + runs[-1].clusters) * cluster_size != allocated:
            raise UnresolvedError("a piece of the $MFT's runs is missing: it is damaged")
        return stream_of_what_is_known()

    # Records ------------------------------------------------------------------------------------

    def record(self, number: int) -> Record:
        """Return one record."""
        size = self.geometry.record_size
        first = number - number % _RECORDS_AT_ONCE
        data = self._blocks.get(first)
        if data is None:
            data = self._stream.read(offset=first * size, length=_RECORDS_AT_ONCE * size)
            self._blocks[first] = data
            if len(self._blocks) > _BLOCKS_KEPT:
                del self._blocks[next(iter(self._blocks))]
        begin = (number - first) * size
        raw = data[begin : begin + size]
        if len(raw) < size:
            raise UnresolvedError(f"MFT record {number} does not exist: it is damaged")
        return parse_record(raw, number=number)

    def raw_records(self) -> Iterator[tuple[int, bytes]]:
        """Yield number and bytes of every record that may be in use, in their order."""
        size = self.geometry.record_size
        used = self._bitmap()
        at_once = _READ_AHEAD // size
        for first in range(0, self.record_count, at_once):
            count = min(at_once, self.record_count - first)
            data = self._stream.read(offset=first * size, length=count * size)
            for number in range(first, first + count):
                begin = (number - first) * size
                is_used = used[number >> 3] >> (number & 7) & 1
                if not is_used and (data[begin : begin + 4] != b"FILE" or not data[begin + 22] & 1):
                    continue
                raw = data[begin : begin + size]
                if not is_used and parse_record(raw, number=number).is_in_use:
                    raise UnresolvedError(
                        f"MFT record {number} is in use and free at once: it is damaged"
                    )
                yield number, raw

    def _bitmap(self) -> bytes:
        """Return the bitmap of the records in use, lowest bit first."""
        pieces = self.file(MFT).pieces.get((INDEX_BITMAP, b""))
        if pieces is None:
            raise UnresolvedError("the $MFT has no bitmap: it is damaged")
        bitmap = self.content(pieces, size_max=self.record_count // 8 + _BITMAP_SPARE)
        if len(bitmap) * 8 < self.record_count:
            raise UnresolvedError("the $MFT's bitmap is too short: it is damaged")
        return bitmap

    # Files --------------------------------------------------------------------------------------

    def file(self, number: int) -> File:
        """Return the file of a base record in use."""
        found = self._files.get(number)
        if found is None:
            record = self.record(number)
            found = self.assemble(record, record.attributes())
            self._files[number] = found
            if len(self._files) > _FILES_KEPT:
                del self._files[next(iter(self._files))]
        return found

    def assemble(self, record: Record, attributes: list[Attribute]) -> File:
        """Return the file that begins with this record, which has these attributes."""
        if not record.is_in_use or record.base:
            raise UnresolvedError(f"MFT record {record.number} is not a file's: it is damaged")
        for attribute in attributes:
            if attribute.kind == ATTRIBUTE_LIST:
                attributes = self._collect(record, attribute, attributes)
                break
        file = File(
            number=record.number, sequence=record.sequence, is_directory=record.is_directory
        )
        for attribute in attributes:
            kind = attribute.kind
            if kind == FILE_NAME:
                value = attribute.value()
                parent, length, namespace = NAME_HEAD.unpack_from(value)
                name = value[NAME_HEAD.size : NAME_HEAD.size + 2 * length]
                if len(name) != 2 * length:
                    raise UnresolvedError(f"MFT record {record.number} has a damaged name")
                if namespace != DOS_NAME:
                    file.names.append((parent, name))
            elif kind == STANDARD_INFORMATION:
                file.changed = int.from_bytes(attribute.value()[8:16], "little")
            elif kind == DATA:
                file.streams.setdefault(attribute.name, []).append(attribute)
            else:
                file.pieces.setdefault((kind, attribute.name), []).append(attribute)
        if len(file.pieces) + len(file.streams) < len(attributes) - len(file.names):
            for pieces in (*file.pieces.values(), *file.streams.values()):
                if len(pieces) > 1 and any(piece.is_resident for piece in pieces):
                    raise UnresolvedError(f"MFT record {record.number} has an attribute twice")
        return file

    def _collect(self, record: Record, listing: Attribute, own: list[Attribute]) -> list[Attribute]:
        """Return the attributes of a file that has an attribute list."""
        known = {record.number: {(a.kind, a.instance): a for a in own}}
        found: list[Attribute] = [listing]
        for entry in parse_list(self._list_bytes(listing)):
            number = entry.record & REFERENCE_MASK
            if entry.kind == ATTRIBUTE_LIST:
                continue
            if number not in known:
                known[number] = self._listed(self.record(number), record, entry.record)
            attribute = known[number].get((entry.kind, entry.instance))
            if (
                attribute is None
                or attribute.name != entry.name
                or entry.lowest_vcn != (0 if attribute.is_resident else attribute.vcns()[0])
            ):
                raise UnresolvedError(
                    f"MFT record {record.number}: its attribute list and record {number} contradict"
                )
            found.append(attribute)
        # What a record holds and the list does not name would be nobody's.
        if sum(len(of_one) for of_one in known.values()) != len(found):
            raise UnresolvedError(f"MFT record {record.number}: its attribute list is incomplete")
        return found

    @staticmethod
    def _listed(part: Record, record: Record, reference: int) -> dict[tuple[int, int], Attribute]:
        """Return the attributes of a record that continues another, by type and instance."""
        expected = reference_of(record.number, record.sequence)
        if not part.is_in_use or part.base != expected or part.sequence != reference >> 48:
            raise UnresolvedError(
                f"MFT record {part.number} does not continue record {record.number}: it is damaged"
            )
        return {(a.kind, a.instance): a for a in part.attributes()}

    def _list_bytes(self, listing: Attribute) -> bytes:
        return self.content([listing], size_max=LIST_BYTES_MAX)

    # Contents -----------------------------------------------------------------------------------

    def content(self, pieces: list[Attribute], *, size_max: int) -> bytes:
        """Return a whole attribute that is known to be small."""
        if pieces[0].is_resident:
            return pieces[0].value()
        stream = self.stream(pieces)
        if stream.size > size_max:
            raise UnresolvedError(f"an attribute has {stream.size} bytes, too many: it is damaged")
        return stream.read(offset=0, length=stream.size)

    def stream(self, pieces: list[Attribute]) -> Stream:
        """Return a nonresident attribute to read."""
        layout = join_pieces(pieces, self.geometry)
        return Stream(
            self._disk,
            layout.runs,
            cluster_size=self.geometry.cluster_size,
            size=layout.size,
            initialised=layout.initialised,
        )

    def reparse_point(self, file: File) -> tuple[int, bytes] | None:
        """Return the tag and the data of a reparse point, if the file is one."""
        pieces = file.pieces.get((REPARSE_POINT, b""))
        if pieces is None:
            return None
        value = self.content(pieces, size_max=_REPARSE_BYTES_MAX + 8)
        length = int.from_bytes(value[4:6], "little")
        if len(value) < 8 + length:
            raise UnresolvedError(f"MFT record {file.number} has a damaged reparse point")
        return int.from_bytes(value[:4], "little"), value[8 : 8 + length]
