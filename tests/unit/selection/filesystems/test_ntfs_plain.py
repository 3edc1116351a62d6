"""MFT records with nothing special are read in Rust: never other than Python reads them."""

import random

import pytest

from stillblock.native import plain_file
from stillblock.selection.filesystems.ntfs_files import MasterFileTable, first_piece
from stillblock.selection.filesystems.ntfs_records import (
    Geometry,
    join_pieces,
    parse_boot_sector,
    parse_record,
)
from unit.selection.filesystems.mounting import FileDisk
from unit.selection.filesystems.test_ntfs import fill, make, mount

pytestmark = [pytest.mark.needs("mkfs.ntfs", "ntfs-3g"), pytest.mark.slow]

MUTATIONS = 40_000


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> MasterFileTable:
    image = make(tmp_path_factory.mktemp("plain") / "image")
    with mount(image) as top:
        fill(top)
    disk = FileDisk(image)
    return MasterFileTable(disk, parse_boot_sector(disk.pread(offset=0, length=512)))


def by_rust(raw: bytes, number: int, geometry: Geometry):
    return plain_file(
        raw,
        number=number,
        cluster_size=geometry.cluster_size,
        cluster_count=geometry.cluster_count,
    )


def by_python(raw: bytes, number: int, table: MasterFileTable):
    """What a record says; it raises where that is not so plain."""
    record = parse_record(raw, number=number)
    assert not record.is_directory
    file = table.assemble(record, record.attributes())
    assert table.reparse_point(file) is None
    assert set(file.streams) <= {b""}, "named streams have data too"
    layout = None
    for pieces in file.streams.values():
        if not pieces[0].is_resident:
            assert first_piece(pieces).flags == 0
            found = join_pieces(pieces, table.geometry)
            layout = (list(map(tuple, found.runs)), *found[1:])
    return file.sequence, file.names, file.changed, file.size, layout


def test_nearly_all_files_are_plain_and_read_alike(table: MasterFileTable):
    plain = 0
    for number, raw in table.raw_records():
        found = by_rust(raw, number, table.geometry)
        if found is not None:
            assert found == by_python(raw, number, table)
            plain += 1
    # Not: directories, the file with streams and the one in pieces, and the system's own.
    assert plain > 300


def test_damaged_records_are_never_read_otherwise(table: MasterFileTable):
    """Where the two differ, Rust says nothing: a record it reads, Python reads the same."""
    geometry = table.geometry
    plain = [
        (number, raw)
        for number, raw in table.raw_records()
        if by_rust(raw, number, geometry) is not None
    ]
    # Numbers in headers, attributes and runs are what matters; names and padding hardly do.
    chance = random.Random(1)
    read = refused = 0
    for _ in range(MUTATIONS):
        number, raw = chance.choice(plain)
        damaged = bytearray(raw)
        used = int.from_bytes(raw[24:28], "little")
        for _ in range(chance.randint(1, 2)):
            at = chance.randrange(4, used)
            damaged[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, damaged[at] ^ 1 << at % 8))
        found = by_rust(bytes(damaged), number, geometry)
        if found is None:
            refused += 1
        else:
            assert found == by_python(bytes(damaged), number, table), damaged.hex()
            read += 1
    assert read > MUTATIONS // 10
    assert refused > MUTATIONS // 10


def test_what_is_no_record_is_nothing(table: MasterFileTable):
    _, raw = next(table.raw_records())
    for wrong in (b"", b"FILE", raw[:-1], bytes(1024), b"BAAD" + raw[4:], raw[:512]):
        assert by_rust(wrong, 0, table.geometry) is None
