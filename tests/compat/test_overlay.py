"""A clone's files are what their page says, and a golden store's clones hold what they held."""

from __future__ import annotations

import hashlib
import json

import pytest

from compat.layout import Reader, crc32c, table
from stillblock.errors import NotFoundError
from stillblock.model import CloneState
from stillblock.operations import clones
from stillblock.operations.clones import CloneTarget

BLOCK = 4096
UNIT = 512


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def map_of(golden, number: int) -> bytes:
    return (golden.store / "clones" / f"{number:08x}.map").read_bytes()


def packed_extents(reader: Reader) -> list[tuple[int, int]]:
    """As docs/formats says: a count, then gap and length of each, seven bits a byte."""

    def varint() -> int:
        value = shift = 0
        while True:
            (byte,) = reader.raw(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    found, end = [], 0
    for _ in range(reader.u64()):
        start = end + varint()
        end = start + varint()
        found.append((start, end))
    return found


def records(data: bytes) -> list[tuple[int, int, bytes]]:
    """Return (sequence, kind, payload) of each record, both copies compared."""
    layout = table("overlay.md", "Map record")
    at, found = 2 * BLOCK, []
    while at < len(data):
        fields = layout.decode(data[at:])
        payload = data[at + layout.length :][: int(fields["payload_bytes"])]
        assert fields["magic"] == b"SBCR"
        assert fields["crc"] == crc32c(data[at : at + layout.offset("crc")] + payload)
        length = -(-(layout.length + len(payload)) // UNIT) * UNIT
        assert data[at : at + length] == data[at + length : at + 2 * length]
        found.append((int(fields["sequence"]), int(fields["kind"]), payload))
        at += 2 * length
    return found


def test_a_map_is_what_its_page_says(golden_clones):
    expected = golden_clones.expected
    layout = table("overlay.md", "Map header")
    for number, known in enumerate(expected["clones"], start=1):
        data = map_of(golden_clones, number)
        fields = layout.decode(data)
        assert data[:BLOCK] == data[BLOCK : 2 * BLOCK]
        assert fields["magic"] == b"SBCLONE\0"
        assert fields["version"] == 1
        assert fields["volume"].hex() == expected["uuid"]
        assert fields["number"] == number
        assert fields["generation"] == known["generation"]
        assert fields["size_bytes"] == expected["size_bytes"]
        assert fields["crc"] == crc32c(data[: layout.offset("crc")])
        found = records(data)
        assert [sequence for sequence, _, _ in found] == list(range(1, len(found) + 1))
        own: set[int] = set()
        for _, kind, payload in found:
            reader = Reader(payload)
            if kind == 1:
                reader.raw(8)
                for start, end in packed_extents(reader):
                    own |= set(range(start, end))
            else:
                assert kind == 2
                meta = json.loads(reader.blob())
                assert (meta["kind"], meta["name"]) == ("clone-record", known["name"])
            assert reader.is_done
        assert sorted(own) == known["own_blocks"]
        name = f"{number:08x}-{known['generation']:08x}.data"
        assert (golden_clones.store / "clones" / name).stat().st_size == expected["size_bytes"]


def test_golden_clones_hold_what_they_held(golden_clones):
    expected = golden_clones.expected
    with golden_clones.open() as volume:
        opened = volume._opened
        listed = clones.list_clones(opened).clones
        assert [c.name for c in listed] == [c["name"] for c in expected["clones"]]
        assert {c.state for c in listed} == {CloneState.OK}
        for known, info in zip(expected["clones"], listed, strict=True):
            assert (info.id, info.own_bytes) == (known["id"], BLOCK * len(known["own_blocks"]))
            disk = opened.engine.open_clone(number=info.number)
            assert digest(disk.pread(offset=0, length=disk.size_bytes)) == known["content"]
        with volume.find("monday").view() as view:
            assert digest(view.readall()) == expected["monday"]
        assert digest(volume.pread(offset=0, length=volume.size)) == expected["live"]


def test_what_was_written_lately_is_an_entry_as_the_page_says(golden_clones):
    layout = table("overlay.md", "Recent entry")
    with golden_clones.open() as volume:
        engine = volume._opened.engine
        disk = engine.open_clone(number=1)
        disk.pwrite(b"x" * 3 * BLOCK, offset=40 * BLOCK)
        path = next((golden_clones.store / "clones").glob("00000001-*.recent"))
        fields = layout.decode(path.read_bytes())
        assert fields["magic"] == b"SBRW"
        assert (fields["start"], fields["end"]) == (40, 43)
        assert fields["crc"] == crc32c(path.read_bytes()[: layout.offset("crc")])


def test_a_map_of_a_newer_version_is_told_and_kept(golden_clones):
    layout = table("overlay.md", "Map header")
    path = golden_clones.store / "clones" / "00000001.map"
    data = bytearray(path.read_bytes())
    for page in (0, BLOCK):
        data[page + layout.offset("version")] = 2
        end = page + layout.offset("crc")
        data[end : end + 4] = crc32c(data[page:end]).to_bytes(4, "little")
    path.write_bytes(data)
    with golden_clones.open() as volume:
        first, *others = clones.list_clones(volume._opened).clones
        assert first.state is CloneState.DAMAGED
        assert "newer" in first.reason
        assert {c.state for c in others} == {CloneState.OK}
        with pytest.raises(NotFoundError):
            clones.show_clone(volume._opened, CloneTarget(snapshot="monday", clone="written"))
    assert path.read_bytes() == data
