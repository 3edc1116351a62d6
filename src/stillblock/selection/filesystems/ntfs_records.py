"""NTFS in its pieces: the boot sector, MFT records, their attributes, and where those lie.

Layouts: "NTFS Documentation" of the Linux-NTFS project; Microsoft, [MS-FSCC] for file attributes
and reparse tags. Numbers are little-endian. A *VCN* counts clusters from the start of an
attribute, an *LCN* from the start of the volume.
"""

from bisect import bisect_right
from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple

from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.filesystem import UnresolvedError

MFT, MFT_MIRROR, LOG, VOLUME, BITMAP, EXTEND = 0, 1, 2, 3, 6, 11
ROOT: Final = 5
FIRST_USER: Final = 16
"""Records below are the system's own, and no user can name them."""

STANDARD_INFORMATION: Final = 0x10
ATTRIBUTE_LIST: Final = 0x20
FILE_NAME: Final = 0x30
VOLUME_NAME: Final = 0x60
VOLUME_INFORMATION: Final = 0x70
DATA: Final = 0x80
INDEX_ROOT: Final = 0x90
INDEX_ALLOCATION: Final = 0xA0
INDEX_BITMAP: Final = 0xB0
REPARSE_POINT: Final = 0xC0

COMPRESSED: Final = 0x00FF
ENCRYPTED: Final = 0x4000
SPARSE: Final = 0x8000

REFERENCE_MASK: Final = (1 << 48) - 1
"""A reference to a record: 48 bits of number, 16 bits of sequence."""
_STRIDE: Final = 512
"""Each 512 bytes of a record end in two bytes that tell whether all were written together."""
_ATTRIBUTES_MAX: Final = 4096
_SEPARATE_RUNS_MAX: Final = 1_000_000
LIST_BYTES_MAX: Final = 256 * 1024
"""NTFS's own limit of an attribute list."""

_RECORD: Final = Struct("<4sHHQHHHHIIQ")
_ATTRIBUTE: Final = Struct("<IIBBHHH")
_RESIDENT: Final = Struct("<IH")
_NONRESIDENT: Final = Struct("<qqHB5xqqq")
_LIST_ENTRY: Final = Struct("<IHBBQQH")


class ClusterRun(NamedTuple):
    """`clusters` clusters from VCN `vcn` lie at LCN `lcn`; None is a hole."""

    vcn: int
    clusters: int
    lcn: int | None


class Attribute(NamedTuple):
    """One attribute of a record, or one piece of it. `data` is the whole record."""

    kind: int
    name: bytes
    """UTF-16."""
    flags: int
    instance: int
    is_resident: bool
    data: bytes
    offset: int
    """Where it begins in the record."""
    length: int

    def value(self) -> bytes:
        """Return the value of a resident attribute."""
        size, begin = _RESIDENT.unpack_from(self.data, self.offset + 16)
        if not self.is_resident or begin + size > self.length:
            raise UnresolvedError(f"an attribute of type {self.kind:#x} is damaged")
        begin += self.offset
        return self.data[begin : begin + size]

    def vcns(self) -> tuple[int, int]:
        """Return the first VCN of a nonresident piece, and the one after its last."""
        lowest, highest = _NONRESIDENT.unpack_from(self.data, self.offset + 16)[:2]
        if lowest < 0 or highest < lowest - 1:
            raise UnresolvedError(f"an attribute of type {self.kind:#x} has damaged runs")
        return lowest, highest + 1

    def sizes(self) -> tuple[int, int, int]:
        """Return the allocated, the data and the initialised size; of a first piece only."""
        allocated, size, initialised = _NONRESIDENT.unpack_from(self.data, self.offset + 16)[4:]
        if not 0 <= initialised <= size <= allocated:
            raise UnresolvedError(f"an attribute of type {self.kind:#x} has damaged sizes")
        return allocated, size, initialised

    def runs(self, *, cluster_count: int) -> list[ClusterRun]:
        """Return where a nonresident piece lies."""
        lowest, highest, begin = _NONRESIDENT.unpack_from(self.data, self.offset + 16)[:3]
        if begin < 64 or begin > self.length or lowest < 0:
            raise UnresolvedError(f"an attribute of type {self.kind:#x} has damaged runs")
        offset = self.offset
        return _decode_runs(
            self.data, offset + begin, offset + self.length, (lowest, highest + 1), cluster_count
        )


def _decode_runs(
    data: bytes, at: int, end: int, vcns: tuple[int, int], cluster_count: int
) -> list[ClusterRun]:
    """Read mapping pairs: a byte of two field widths, a length, and a signed step of the LCN."""
    runs: list[ClusterRun] = []
    vcn, vcn_end = vcns
    lcn = 0
    from_bytes = int.from_bytes
    while at < end and (head := data[at]):
        middle = at + 1 + (head & 15)
        after = middle + (head >> 4)
        count = from_bytes(data[at + 1 : middle], "little", signed=True)
        if after > end or head & 15 > 8 or head >> 4 > 8 or count <= 0:
            raise UnresolvedError("a file's runs are damaged")
        if middle == after:
            runs.append(ClusterRun(vcn, count, None))
        else:
            lcn += from_bytes(data[middle:after], "little", signed=True)
            if lcn < 0 or lcn + count > cluster_count:
                raise UnresolvedError("a file's runs lie outside the filesystem: it is damaged")
            runs.append(ClusterRun(vcn, count, lcn))
        vcn += count
        at = after
    if at >= end or vcn != vcn_end:
        raise UnresolvedError("a file's runs do not add up to its size: it is damaged")
    return runs


class Record(NamedTuple):
    """An MFT record whose sectors belong together."""

    number: int
    sequence: int
    is_in_use: bool
    is_directory: bool
    base: int
    """Reference to the record that this one continues; 0 if it is a file's first."""
    data: bytes
    attributes_offset: int
    used: int

    def attributes(self) -> list[Attribute]:
        """Return what is in this record."""
        found: list[Attribute] = []
        data, at, used = self.data, self.attributes_offset, self.used
        while at + 4 <= used:
            if data[at : at + 4] == b"\xff\xff\xff\xff":
                return found
            if at + 24 > used or len(found) >= _ATTRIBUTES_MAX:
                break
            kind, length, nonresident, name_length, name_at, flags, instance = (
                _ATTRIBUTE.unpack_from(data, at)
            )
            if length < 24 or length & 7 or at + length > used or nonresident > 1:
                break
            if nonresident and length < 64:
                break
            if name_length:
                name_at += at
                name = data[name_at : name_at + 2 * name_length]
                if name_at + 2 * name_length > at + length:
                    break
            else:
                name = b""
            found.append(Attribute(kind, name, flags, instance, not nonresident, data, at, length))
            at += length
        raise UnresolvedError(f"MFT record {self.number} is damaged")


def join_sectors(raw: bytes, *, magic: bytes, what: str) -> bytearray:
    """Return a record as it was before its sectors were marked; raise if they do not match."""
    if raw[:4] != magic:
        raise UnresolvedError(f"{what} has no {magic.decode()} signature: it is damaged")
    begin = raw[4] | raw[5] << 8
    count = raw[6] | raw[7] << 8
    if count != len(raw) // _STRIDE + 1 or begin & 1 or not 8 <= begin <= _STRIDE - 2 * count:
        raise UnresolvedError(f"{what} is damaged")
    data = bytearray(raw)
    mark = raw[begin : begin + 2]
    end = _STRIDE - 2
    for at in range(begin + 2, begin + 2 * count, 2):
        if raw[end : end + 2] != mark:
            raise UnresolvedError(f"{what} was written in part only")
        data[end : end + 2] = raw[at : at + 2]
        end += _STRIDE
    return data


def parse_record(raw: bytes, *, number: int) -> Record:
    """Return MFT record `number` from its bytes on disk."""
    data = join_sectors(raw, magic=b"FILE", what=f"MFT record {number}")
    _, marks, mark_count, _, sequence, _, attributes_offset, flags, used, allocated, base = (
        _RECORD.unpack_from(data)
    )
    if (
        attributes_offset & 7
        or attributes_offset < marks + 2 * mark_count
        or used > len(data)
        or allocated != len(data)
        or attributes_offset + 4 > used
    ):
        raise UnresolvedError(f"MFT record {number} is damaged")
    # NTFS 3.1 keeps the number in the record, before the marks of the sectors.
    if marks >= 48 and int.from_bytes(data[44:48], "little") != number & 0xFFFFFFFF:
        raise UnresolvedError(f"MFT record {number} is another one: it is damaged")
    return Record(
        number, sequence, bool(flags & 1), bool(flags & 2), base, bytes(data),
        attributes_offset, used,
    )  # fmt: skip


class ListEntry(NamedTuple):
    """Where one piece of a file's attributes is."""

    kind: int
    record: int
    """Reference to the record that has it."""
    instance: int
    lowest_vcn: int
    name: bytes


def parse_list(data: bytes) -> list[ListEntry]:
    """Return the entries of an attribute list."""
    found: list[ListEntry] = []
    at = 0
    while at < len(data):
        if at + 26 > len(data):
            raise UnresolvedError("an attribute list is damaged")
        kind, length, name_length, name_at, lowest, record, instance = _LIST_ENTRY.unpack_from(
            data, at
        )
        name = data[at + name_at : at + name_at + 2 * name_length]
        if length < 26 or at + length > len(data) or len(name) < 2 * name_length:
            raise UnresolvedError("an attribute list is damaged")
        found.append(ListEntry(kind, record, instance, lowest, name))
        at += length
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What the boot sector says."""

    sector_size: int
    cluster_size: int
    cluster_count: int
    record_size: int
    mft_lcn: int
    serial: int
    volume_bytes: int
    """Without the sector that holds the copy of the boot sector."""


def parse_boot_sector(sector: bytes) -> Geometry:
    """Return the geometry; raise `UnresolvedError` for one that cannot be."""
    sector_size = int.from_bytes(sector[0x0B:0x0D], "little")
    per_cluster = sector[0x0D]
    if per_cluster > 0x80:
        # Clusters above 64 KiB: the exponent, negative.
        per_cluster = 1 << min(256 - per_cluster, 31)
    cluster_size = sector_size * per_cluster
    sector_count = int.from_bytes(sector[0x28:0x30], "little")
    mft_lcn = int.from_bytes(sector[0x30:0x38], "little")
    mirror_lcn = int.from_bytes(sector[0x38:0x40], "little")
    record = int.from_bytes(sector[0x40:0x41], "little", signed=True)
    record_size = record * cluster_size if record > 0 else 1 << -max(record, -31)
    if (
        sector[510:512] != b"\x55\xaa"
        or sector_size not in (512, 1024, 2048, 4096)
        or per_cluster & (per_cluster - 1)
        or not sector_size <= cluster_size <= 2 << 20
        or record_size not in (1024, 2048, 4096, 8192, 16384, 32768, 65536)
        or not per_cluster <= sector_count < 1 << 54
        or any(sector[0x0E:0x15])
        or not 0 < mft_lcn < sector_count // per_cluster
        or not 0 < mirror_lcn < sector_count // per_cluster
        or mft_lcn * cluster_size + record_size > sector_count * sector_size
    ):
        raise UnresolvedError("its NTFS boot sector is damaged or of an unknown kind")
    return Geometry(
        sector_size=sector_size,
        cluster_size=cluster_size,
        cluster_count=sector_count // per_cluster,
        record_size=record_size,
        mft_lcn=mft_lcn,
        serial=int.from_bytes(sector[0x48:0x50], "little"),
        volume_bytes=sector_count * sector_size,
    )


class Stream:
    """A nonresident attribute, readable."""

    def __init__(
        self, disk: Disk, runs: list[ClusterRun], *, cluster_size: int, size: int, initialised: int
    ) -> None:
        self._disk = disk
        self._runs = runs
        self._starts = [run.vcn * cluster_size for run in runs]
        self._cluster_size = cluster_size
        self.size = size
        self._initialised = min(size, initialised)

    def read(self, *, offset: int, length: int) -> bytes:
        """Return `length` bytes, short at its end; zeros in holes and past what was written."""
        end = min(offset + length, self.size)
        pieces: list[bytes] = []
        index = max(bisect_right(self._starts, offset) - 1, 0)
        while offset < end:
            stop = end
            place: int | None = None
            if offset < self._initialised:
                if index >= len(self._runs) or offset < self._starts[index]:
                    raise UnresolvedError("a file is longer than its runs: it is damaged")
                run = self._runs[index]
                begin = self._starts[index]
                run_end = begin + run.clusters * self._cluster_size
                if offset >= run_end:
                    index += 1
                    continue
                stop = min(end, run_end, self._initialised)
                if run.lcn is not None:
                    place = run.lcn * self._cluster_size + offset - begin
            if place is None:
                pieces.append(bytes(stop - offset))
            else:
                pieces.append(read_exactly(self._disk, offset=place, length=stop - offset))
            offset = stop
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Layout(NamedTuple):
    """A whole nonresident attribute."""

    runs: list[ClusterRun]
    allocated: int
    """In bytes, holes included; as are the others."""
    size: int
    initialised: int
    """What lies past it reads as zeros."""


def join_pieces(pieces: list[Attribute], geometry: Geometry) -> Layout:
    """Return where an attribute lies from all its pieces; raise if one is missing."""
    if len(pieces) > 1:
        pieces = sorted(pieces, key=Attribute.vcns)
    runs: list[ClusterRun] = []
    vcn = 0
    for piece in pieces:
        first, end = piece.vcns()
        if first != vcn:
            raise UnresolvedError("a piece of a file's runs is missing: it is damaged")
        vcn = end
        runs += piece.runs(cluster_count=geometry.cluster_count)
        if len(runs) > _SEPARATE_RUNS_MAX:
            raise UnresolvedError(f"a file lies in more than {_SEPARATE_RUNS_MAX} pieces")
    allocated, size, initialised = pieces[0].sizes()
    if allocated != vcn * geometry.cluster_size:
        raise UnresolvedError("a file's runs do not add up to its allocation: it is damaged")
    return Layout(runs, allocated, size, initialised)
