"""NTFS 3: files by walking the directories, what is allocated by reading every MFT record.

NTFS has no checksums. What stands in for them: every cluster that any record claims is claimed
once and is allocated in $Bitmap, every name a directory gives is one the file itself has, and
every piece of a file is found. Nothing is left out of a volume where one of that is not so.
"""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from stillblock.extents import normalise, whole
from stillblock.model import Extent, Extents
from stillblock.native import plain_file
from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.allocation import Claims, clear_runs
from stillblock.selection.filesystems.damage import Verdict, damage_is_unresolved
from stillblock.selection.filesystems.filesystem import (
    FileKind,
    Identity,
    Layout,
    Node,
    Run,
    UnresolvedError,
    add_run,
    laid_out,
)
from stillblock.selection.filesystems.names import checked_name, text_of_utf16
from stillblock.selection.filesystems.ntfs_files import (
    File,
    MasterFileTable,
    first_piece,
    reference_of,
    unix_ns,
)
from stillblock.selection.filesystems.ntfs_index import directory_names
from stillblock.selection.filesystems.ntfs_records import (
    BITMAP,
    COMPRESSED,
    DATA,
    ENCRYPTED,
    EXTEND,
    FIRST_USER,
    LOG,
    MFT_MIRROR,
    REFERENCE_MASK,
    ROOT,
    SPARSE,
    VOLUME,
    VOLUME_INFORMATION,
    VOLUME_NAME,
    Attribute,
    Record,
    Stream,
    join_pieces,
    parse_boot_sector,
    parse_record,
)
from stillblock.selection.filesystems.ntfs_state import (
    check_hibernation,
    check_log,
    check_volume_flags,
)

_METADATA_RUNS_MAX: Final = 1_000_000
_EXTEND_FILES_MAX: Final = 100_000
_BITMAP_PIECE: Final = 1 << 20
_KEPT_MAX: Final = 200_000
"""Files, two each, and runs that the scan of the MFT keeps for the walk after it: 60 MiB."""
_SEEN_MAX: Final = 1024
_HIBERNATION_HEAD: Final = 4096
_MIRRORED: Final = 4

_TAG_SYMLINK: Final = 0xA000000C
_TAG_MOUNT_POINT: Final = 0xA0000003
_TAG_IS_NAME: Final = 0x20000000
"""The bit of a reparse tag that says: this stands for something elsewhere."""
_TAGS_SPECIAL: Final = (0x80000023, 0x80000024, 0x80000025, 0x80000026)
"""Sockets, FIFOs and devices of the Windows Subsystem for Linux."""


class Summary(NamedTuple):
    """What is told of a file, and where it lies."""

    reference: int
    names: list[tuple[int, bytes]]
    """The reference of the directory and the UTF-16 name."""
    node: Node
    runs: tuple[Run, ...]
    reason: str
    """Why its runs say nothing; empty if they do."""


def open_ntfs(disk: Disk) -> "Ntfs":
    """Return the NTFS volume on a disk or partition."""
    with damage_is_unresolved("NTFS"):
        return Ntfs(disk)


class Ntfs:
    """An NTFS volume. `Filesystem` says what its methods promise."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        if disk.size < 4096:
            raise UnresolvedError("it is too small for NTFS")
        self._geometry = parse_boot_sector(read_exactly(disk, offset=0, length=512))
        if self._geometry.volume_bytes > disk.size:
            raise UnresolvedError(
                f"NTFS says that it has {self._geometry.volume_bytes} bytes, "
                f"and {disk.size} are there"
            )
        self._table = MasterFileTable(disk, self._geometry)
        self._check_settled = Verdict(self._find_unsettled)
        self._metadata = Verdict(self._find_metadata)
        self._kept: dict[int, Summary] = {}
        self._seen: dict[int, Summary] = {}
        self._volume = self._table.file(VOLUME)
        self._identity = Identity(
            kind="ntfs",
            label=self._label(),
            uuid=f"{self._geometry.serial:016X}",
            block_size=self._geometry.cluster_size,
            # The copy of the boot sector lies in the sector after the last.
            size=min(disk.size, self._geometry.volume_bytes + self._geometry.sector_size),
            is_case_sensitive=False,
        )

    @property
    def identity(self) -> Identity:
        """Which one it is."""
        return self._identity

    @property
    def caveats(self) -> tuple[str, ...]:
        """Nothing: what is in use or in doubt is unresolved."""
        return ()

    def _label(self) -> str:
        pieces = self._volume.pieces.get((VOLUME_NAME, b""))
        return text_of_utf16(pieces[0].value()) if pieces else ""

    # What must hold before anything is left out -------------------------------------------------

    def _find_unsettled(self) -> None:
        """Raise `UnresolvedError` unless the structures on disk are complete and consistent."""
        information = self._volume.pieces.get((VOLUME_INFORMATION, b""))
        if information is None:
            raise UnresolvedError("NTFS has no volume information: it is damaged")
        check_volume_flags(information[0].value())
        check_log(self._system_stream(LOG))
        mirror = self._system_stream(MFT_MIRROR)
        size = self._geometry.record_size
        for number in range(min(_MIRRORED, mirror.size // size)):
            copy = parse_record(mirror.read(offset=number * size, length=size), number=number)
            if copy != self._table.record(number):
                raise UnresolvedError("the $MFT and its mirror differ; let chkdsk look at it")
        for name, node in self._children(self._table.file(ROOT)):
            if name.lower() == "hiberfil.sys" and node.kind is FileKind.REGULAR:
                check_hibernation(self._read(node, offset=0, length=_HIBERNATION_HEAD))

    def _system_stream(self, number: int) -> Stream:
        pieces = self._table.file(number).streams.get(b"")
        if pieces is None or pieces[0].is_resident or first_piece(pieces).flags:
            raise UnresolvedError(f"NTFS's system file {number} is damaged")
        return self._table.stream(pieces)

    # The tree -----------------------------------------------------------------------------------

    def root(self) -> Node:
        """Return the top directory."""
        with damage_is_unresolved("NTFS"):
            self._check_settled()
            return self._summary(ROOT).node

    def children(self, directory: Node) -> Iterator[tuple[str, Node]]:
        """Yield the names in a directory, and what they lead to."""
        with damage_is_unresolved("NTFS"):
            self._check_settled()
            yield from self._children(self._current(directory))

    def _children(self, directory: File) -> Iterator[tuple[str, Node]]:
        own = directory.reference
        for reference, parent, name in directory_names(self._table, directory):
            number = reference & REFERENCE_MASK
            if number < FIRST_USER:
                continue
            summary = self._summary(number)
            if summary.reference != reference or parent != own or (own, name) not in summary.names:
                raise UnresolvedError(
                    f"directory {directory.number} and MFT record {number} contradict: "
                    "it is damaged"
                )
            yield checked_name(text_of_utf16(name)), summary.node

    def _current(self, node: Node) -> File:
        file = self._table.file(node.number)
        if file.sequence != node.generation:
            raise UnresolvedError(f"MFT record {node.number} is another file's now")
        return file

    # What a file comes to -----------------------------------------------------------------------

    def _summary(self, number: int) -> Summary:
        """Return what a file comes to: kept by the scan, seen lately, or read now."""
        found = self._kept.get(number) or self._seen.get(number)
        if found is None:
            found = self._summarise(self._table.file(number))
            self._seen[number] = found
            if len(self._seen) > _SEEN_MAX:
                del self._seen[next(iter(self._seen))]
        return found

    def _summarise(self, file: File) -> Summary:
        kind, size = FileKind.REGULAR, 0
        runs: tuple[Run, ...] = ()
        reason = ""
        reparse = self._table.reparse_point(file)
        if file.is_directory:
            kind = FileKind.DIRECTORY
        else:
            size = file.size
        if reparse is not None:
            tag, data = reparse
            reason = f"its content is kept elsewhere or in another form (reparse tag {tag:#x})"
            if tag in (_TAG_SYMLINK, _TAG_MOUNT_POINT):
                kind = FileKind.SYMLINK
                size = len(_link_target(tag, data))
            elif tag & _TAG_IS_NAME or tag in _TAGS_SPECIAL:
                kind = FileKind.OTHER
        elif kind is FileKind.REGULAR:
            try:
                runs = self._find_runs(file)
            except UnresolvedError as error:
                reason = error.message
        node = Node(
            number=file.number,
            generation=file.sequence,
            kind=kind,
            size=size,
            links=len(file.names),
            modified_ns=file.modified_ns,
        )
        return Summary(file.reference, file.names, node, runs, reason)

    def _find_runs(self, file: File) -> tuple[Run, ...]:
        """Return where the data lies: the unnamed stream, and the others past its allocation."""
        found: list[Run] = []
        base = 0
        for _, pieces in (
            sorted(file.streams.items()) if len(file.streams) > 1 else (file.streams.items())
        ):
            for piece in pieces:
                if piece.flags:
                    _check_flags(piece.flags)
            if not pieces[0].is_resident:
                layout = join_pieces(pieces, self._geometry)
                self._add_runs(
                    layout.runs, base, found, size=layout.size, initialised=layout.initialised
                )
                base += layout.allocated
        return tuple(found)

    # Data ---------------------------------------------------------------------------------------

    def runs(self, node: Node) -> tuple[Run, ...]:
        """Return where a file's data lies; that of named streams is given past its allocation."""
        with damage_is_unresolved("NTFS"):
            self._metadata()
            summary = self._summary(node.number)
            if summary.node is not node and summary.node != node:
                raise UnresolvedError(f"MFT record {node.number} is another file's now")
            if summary.reason:
                raise UnresolvedError(summary.reason)
            return summary.runs

    def layout(self, node: Node) -> Layout:
        """Return where the unnamed stream's bytes are; a resident one lies in its record."""
        with damage_is_unresolved("NTFS"):
            self._metadata()
            file = self._current(node)
            if reason := self._summary(node.number).reason:
                raise UnresolvedError(reason)
            pieces = file.streams.get(b"")
            if pieces is None:
                return Layout()
            if pieces[0].is_resident:
                return Layout(by_reader=whole(node.size))
            stream = join_pieces(pieces, self._geometry)
            found: list[Run] = []
            self._add_runs(stream.runs, 0, found, size=stream.size, initialised=stream.initialised)
            return laid_out(found, size=node.size)

    def _add_runs(
        self,
        pieces: Iterable[tuple[int, int, int | None]],
        base: int,
        found: list[Run],
        *,
        size: int,
        initialised: int,
    ) -> None:
        """Add where a stream lies whose first byte is at `base`: VCN, clusters, LCN or a hole."""
        cluster_size = self._geometry.cluster_size
        for vcn, count, lcn in pieces:
            if lcn is None:
                continue
            offset = vcn * cluster_size
            length = count * cluster_size
            written = initialised - offset if initialised < size else length
            start = lcn * cluster_size
            add_run(found, offset=base + offset, length=length, start=start, written=written)

    def read(self, node: Node, *, offset: int, length: int) -> bytes:
        """Return data of a regular file, or the target of a link; short at its end."""
        with damage_is_unresolved("NTFS"):
            self._check_settled()
            return self._read(node, offset=offset, length=length)

    def _read(self, node: Node, *, offset: int, length: int) -> bytes:
        file = self._current(node)
        if node.kind is FileKind.SYMLINK:
            reparse = self._table.reparse_point(file)
            assert reparse is not None, "its tag made it a link"
            return _link_target(*reparse)[offset : offset + length]
        if reason := self._summary(node.number).reason:
            raise UnresolvedError(reason)
        pieces = file.streams.get(b"")
        if pieces is None:
            return b""
        if pieces[0].is_resident:
            return pieces[0].value()[offset : offset + length]
        return self._table.stream(pieces).read(offset=offset, length=length)

    # Space --------------------------------------------------------------------------------------

    def free(self) -> Extents:
        """Return what $Bitmap has not allocated; that nobody claims it was checked."""
        with damage_is_unresolved("NTFS"):
            self._metadata()
            size = self._geometry.cluster_size
            runs = clear_runs(self._bitmap_pieces(), count=self._geometry.cluster_count)
            return tuple((begin * size, end * size) for begin, end in runs)

    def fixed(self) -> Extents:
        """Return the boot sectors, the system's files, directories and all else but files' data."""
        with damage_is_unresolved("NTFS"):
            return self._metadata()

    def _bitmap_pieces(self) -> Iterator[bytes]:
        stream = self._system_stream(BITMAP)
        if stream.size * 8 < self._geometry.cluster_count:
            raise UnresolvedError("$Bitmap is shorter than the volume: it is damaged")
        for offset in range(0, stream.size, _BITMAP_PIECE):
            yield stream.read(offset=offset, length=_BITMAP_PIECE)

    def _find_metadata(self) -> Extents:
        """Return what is no file's data, after checking that what is claimed is claimed once."""
        self._check_settled()
        geometry = self._geometry
        claims = Claims(geometry.cluster_count, what="NTFS")
        system = self._system_records()
        metadata: list[Extent] = []
        room = _KEPT_MAX
        for number, raw in self._table.raw_records():
            is_system = number < FIRST_USER or number in system
            summary = None if is_system else self._claim_plain(number, raw, claims)
            if summary is None:
                record = parse_record(raw, number=number)
                if not record.is_in_use:
                    continue
                attributes = record.attributes()
                owner = (record.base & REFERENCE_MASK) or number
                is_system = owner < FIRST_USER or owner in system
                metadata += self._claim(record, attributes, claims, is_system=is_system)
                if len(metadata) > _METADATA_RUNS_MAX:
                    raise UnresolvedError("its metadata lies in too many pieces to tell")
                if room <= 0 or record.base or is_system:
                    continue
                summary = self._summarise(self._table.assemble(record, attributes))
            if room > 0:
                self._kept[number] = summary
                room -= 2 + len(summary.runs)
        claims.check_allocated(self._bitmap_pieces())
        return normalise([*metadata, *self._boot_sectors()])

    def _claim(
        self, record: Record, attributes: list[Attribute], claims: Claims, *, is_system: bool
    ) -> Iterator[Extent]:
        """Claim what a record has; yield what of it is no file's data."""
        owner = (record.base & REFERENCE_MASK) or record.number
        cluster_size = self._geometry.cluster_size
        for attribute in attributes:
            if attribute.is_resident:
                continue
            is_metadata = is_system or record.is_directory or attribute.kind != DATA
            for _, count, lcn in attribute.runs(cluster_count=self._geometry.cluster_count):
                if lcn is None:
                    continue
                claims.claim(lcn, count, owner)
                if is_metadata:
                    yield lcn * cluster_size, (lcn + count) * cluster_size

    def _claim_plain(self, number: int, raw: bytes, claims: Claims) -> Summary | None:
        """Claim what a file has that has nothing special; None if it is another kind of record."""
        geometry = self._geometry
        found = plain_file(
            raw,
            number=number,
            cluster_size=geometry.cluster_size,
            cluster_count=geometry.cluster_count,
        )
        if found is None:
            return None
        sequence, names, changed, size, layout = found
        runs: list[Run] = []
        if layout is not None:
            for _, count, lcn in layout[0]:
                if lcn is not None:
                    claims.claim(lcn, count, number)
            places, _, valid, initialised = layout
            self._add_runs(places, 0, runs, size=valid, initialised=initialised)
        node = Node(
            number=number,
            generation=sequence,
            kind=FileKind.REGULAR,
            size=size,
            links=len(names),
            modified_ns=unix_ns(changed),
        )
        return Summary(reference_of(number, sequence), names, node, tuple(runs), "")

    def _boot_sectors(self) -> Iterable[Extent]:
        sector = self._geometry.sector_size
        end = self._geometry.volume_bytes
        yield 0, self._geometry.cluster_size
        yield end, self._identity.size
        # A volume may have been put on a larger partition: the copy is in that one's last sector.
        yield self._disk.size - sector, self._disk.size

    def _system_records(self) -> set[int]:
        """Return the numbers of all below $Extend: journals, quotas, transactions."""
        found: set[int] = {EXTEND}
        pending = [EXTEND]
        while pending:
            directory = self._table.file(pending.pop())
            if not directory.is_directory:
                continue
            for name, node in self._children(directory):
                if node.number in found or len(found) > _EXTEND_FILES_MAX:
                    raise UnresolvedError(f"$Extend is damaged at {name!r}")
                found.add(node.number)
                if node.kind is FileKind.DIRECTORY:
                    pending.append(node.number)
        return found


def _check_flags(flags: int) -> None:
    if flags & COMPRESSED:
        raise UnresolvedError("it is compressed")
    if flags & ENCRYPTED:
        raise UnresolvedError("it is encrypted")
    if flags & ~SPARSE:
        raise UnresolvedError(f"it has unknown flags {flags:#x}")


def _link_target(tag: int, data: bytes) -> bytes:
    """Return where a link leads, in UTF-8: the name for people, or else the name for the system."""
    begin = 12 if tag == _TAG_SYMLINK else 8
    substitute, substitute_length, shown, shown_length = (
        int.from_bytes(data[at : at + 2], "little") for at in (0, 2, 4, 6)
    )
    if not shown_length:
        shown, shown_length = substitute, substitute_length
    target = data[begin + shown : begin + shown + shown_length]
    if len(target) != shown_length:
        raise UnresolvedError("a link's target is damaged")
    return target.decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass")
