"""The byte tables of docs/formats, read from the pages themselves, and what decodes with them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ROOT / "docs" / "formats"
PAGE = 4096
JOURNAL_UNIT = 512


@dataclass(frozen=True)
class Field:
    """One row of a table."""

    offset: int
    length: int
    kind: str
    name: str

    def read(self, data: bytes) -> int | bytes:
        raw = data[self.offset : self.offset + self.length]
        assert len(raw) == self.length, f"{self.name} reaches past the end"
        return raw if self.kind == "bytes" else int.from_bytes(raw, "little")


@dataclass(frozen=True)
class Table:
    """A structure of fixed width, as a page describes it."""

    fields: tuple[Field, ...]

    def decode(self, data: bytes) -> dict[str, int | bytes]:
        return {field.name: field.read(data) for field in self.fields}

    def offset(self, name: str) -> int:
        return next(field.offset for field in self.fields if field.name == name)

    @property
    def length(self) -> int:
        last = self.fields[-1]
        return last.offset + last.length


@cache
def table(page: str, heading: str | None = None) -> Table:
    """Return the table of byte offsets under a heading of a page; None: the page's first one.

    A table says the same thing three ways (offset, length, type); they must agree.
    """
    text = (FORMATS / page).read_text(encoding="utf-8")
    if heading is not None:
        found = re.search(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)
        assert found, f"{page} has no heading {heading!r}"
        text = text[found.end() :]
    _, separator, text = text.partition("| offset | bytes | type | field |")
    assert separator, f"{page}: no table of offsets under {heading!r}"
    fields: list[Field] = []
    for line in text.splitlines()[2:]:
        if not line.startswith("|"):
            break
        offset, length, kind, name = (cell.strip() for cell in line.split("|")[1:5])
        fields.append(Field(offset=int(offset), length=int(length), kind=kind, name=name))
    assert fields, f"{page}: the table under {heading!r} is empty"
    at = 0
    for field in fields:
        assert field.offset == at, f"{page}: {field.name} does not follow the field before it"
        assert field.kind == "bytes" or field.kind == f"u{8 * field.length}", f"{page}: {field}"
        at += field.length
    return Table(tuple(fields))


def numbered_names(page: str, heading: str) -> dict[int, str]:
    """Return the `| kind | name |` table under a heading."""
    text = (FORMATS / page).read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)
    assert found, f"{page} has no heading {heading!r}"
    _, separator, body = text[found.end() :].partition("| kind | name |")
    assert separator, f"{page}: no table of kinds under {heading!r}"
    lines = body.partition("\n\n")[0]
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", lines, flags=re.MULTILINE)
    return {int(number): name for number, name in rows}


def crc32c(data: bytes) -> int:
    """CRC-32C by the definition, bit by bit through a table: nothing shared with the program."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _CRC_TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _crc_row(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value


_CRC_TABLE = tuple(_crc_row(value) for value in range(256))


class Reader:
    """Takes what docs/formats/log.md calls u32, u64, extents and blobs off the front."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def raw(self, length: int) -> bytes:
        found = self.data[self.at : self.at + length]
        assert len(found) == length, "the bytes end early"
        self.at += length
        return found

    def u32(self) -> int:
        return int.from_bytes(self.raw(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.raw(8), "little")

    def extents(self) -> list[tuple[int, int]]:
        return [(self.u64(), self.u64()) for _ in range(self.u64())]

    def blob(self) -> bytes:
        return self.raw(self.u64())

    def varint(self) -> int:
        value, shift = 0, 0
        while True:
            (byte,) = self.raw(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    def packed_extents(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        end = 0
        for _ in range(self.u64()):
            start = end + self.varint()
            end = start + self.varint()
            found.append((start, end))
        return found

    @property
    def is_done(self) -> bool:
        return self.at == len(self.data)


@dataclass(frozen=True)
class JournalRecord:
    """A record, and where it is."""

    at: int
    header: dict[str, int | bytes]
    name: str
    payload: bytes


def journal_records(data: bytes) -> list[JournalRecord]:
    """Decode a whole journal by docs/formats/journal.md."""
    layout, names = table("journal.md", "Record"), numbered_names("journal.md", "Kinds")
    found: list[JournalRecord] = []
    at = 0
    while at < len(data):
        header = layout.decode(data[at:])
        start = at + layout.length
        payload = data[start : start + int(header["payload_bytes"])]
        covered = data[at : at + layout.offset("crc")] + payload
        assert header["magic"] == b"SBJR"
        if found:
            assert header["sequence"] == int(found[-1].header["sequence"]) + 1
        elif names[int(header["kind"])] != "Compacted":
            assert header["sequence"] == 1
        assert header["crc"] == crc32c(covered)
        found.append(
            JournalRecord(at=at, header=header, name=names[int(header["kind"])], payload=payload)
        )
        end = start + len(payload)
        at = end + -end % JOURNAL_UNIT
        assert not any(data[end:at]), "padding is zero"
    return found


def seal_segment_header(page: bytearray, start: int = 0) -> None:
    """Make the checksum of a segment header that was changed right again."""
    crc_at = table("log.md", "Segment header").offset("crc")
    covered = bytes(page[start : start + crc_at])
    page[start + crc_at : start + crc_at + 4] = crc32c(covered).to_bytes(4, "little")


def seal_journal_record(record: bytearray) -> None:
    """Give a changed record its right checksum."""
    layout = table("journal.md", "Record")
    payload_bytes = int(layout.decode(bytes(record))["payload_bytes"])
    crc_at = layout.offset("crc")
    covered = record[:crc_at] + record[layout.length : layout.length + payload_bytes]
    record[crc_at : crc_at + 4] = crc32c(bytes(covered)).to_bytes(4, "little")


@dataclass(frozen=True)
class Descriptor:
    """A line of a batch, with its payload if it has one."""

    kind: str
    first_block: int
    block_count: int
    payload: bytes | None


@dataclass(frozen=True)
class Batch:
    """A batch, and the page it begins at."""

    page: int
    header: dict[str, int | bytes]
    descriptors: tuple[Descriptor, ...]


@dataclass(frozen=True)
class Segment:
    """A whole segment file."""

    header: dict[str, int | bytes]
    epoch_header: bytes
    batches: tuple[Batch, ...]


def segment(data: bytes, *, block_size: int, punched_is_fine: bool = True) -> Segment:
    """Decode a whole segment by docs/formats/log.md, checking every checksum."""
    layout = table("log.md", "Segment header")
    header = layout.decode(data)
    assert header["magic"] == b"SBLOGSEG"
    assert header["version"] in (1, 3)
    assert header["crc"] == crc32c(data[: layout.offset("crc")])
    length = int(header["epoch_header_bytes"])
    pages = 1 + -(-length // PAGE)
    assert data[: pages * PAGE] == data[pages * PAGE : 2 * pages * PAGE], "both copies are equal"
    blob = data[PAGE : PAGE + length]
    assert header["epoch_header_crc"] == crc32c(blob)
    batches: list[Batch] = []
    page = 2 * pages
    while page * PAGE < len(data):
        found = _batch(data, page, block_size=block_size, punched_is_fine=punched_is_fine)
        batches.append(found)
        page += 2 * int(found.header["head_pages"]) + int(found.header["payload_pages"])
    return Segment(header=header, epoch_header=blob, batches=tuple(batches))


def _batch(data: bytes, page: int, *, block_size: int, punched_is_fine: bool) -> Batch:
    layout, line = table("log.md", "Batch header"), table("log.md", "Descriptor")
    names = numbered_names("log.md", "Descriptor")
    head_at = page * PAGE
    header = layout.decode(data[head_at:])
    head_bytes = int(header["head_pages"]) * PAGE
    payload_at = head_at + head_bytes
    tail_at = payload_at + int(header["payload_pages"]) * PAGE
    for at, magic in ((head_at, b"SBBH"), (tail_at, b"SBBT")):
        copy = layout.decode(data[at:])
        assert copy["magic"] == magic
        assert copy["reserved"] == bytes(12)
        assert copy["crc"] == crc32c(data[at : at + layout.offset("crc")])
        assert {**copy, "magic": 0, "crc": 0} == {**header, "magic": 0, "crc": 0}
    lines_bytes = int(header["descriptor_count"]) * line.length
    lines = data[head_at + layout.length : head_at + layout.length + lines_bytes]
    assert header["descriptors_crc"] == crc32c(lines)
    rest_of_head = slice(layout.length, head_bytes)
    assert data[head_at:][rest_of_head] == data[tail_at:][rest_of_head]
    descriptors: list[Descriptor] = []
    for start in range(0, lines_bytes, line.length):
        found = line.decode(lines[start:])
        kind, block = names[int(found["kind"])], int(found["first_block"])
        payload = None
        if kind == "PRESERVE":
            payload = data[payload_at : payload_at + block_size]
            payload_at += block_size
            identity = block.to_bytes(8, "little") + int(header["epoch"]).to_bytes(4, "little")
            is_punched = punched_is_fine and not any(payload)
            assert is_punched or found["checksum"] == crc32c(identity + payload)
        else:
            assert found["checksum"] == 0
        descriptors.append(
            Descriptor(
                kind=kind,
                first_block=block,
                block_count=int(found["block_count"]),
                payload=payload,
            )
        )
    assert payload_at == tail_at
    return Batch(page=page, header=header, descriptors=tuple(descriptors))
