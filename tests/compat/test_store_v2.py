"""A store with index files and merged segments is what its pages say, and holds what it held."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from compat.layout import PAGE, Reader, crc32c, table

BLOCK = 4096
CLASSES = 9


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def index_files(golden_v2) -> list[Path]:
    return sorted((golden_v2.store / "log").glob("*.idx"))


def merged_segments(golden_v2) -> list[bytes]:
    layout = table("log.md", "Segment header")
    contents = [path.read_bytes() for path in golden_v2.segments()]
    return [data for data in contents if layout.decode(data)["version"] == 2]


def check_contents(golden_v2) -> None:
    expected = golden_v2.expected
    with golden_v2.open() as volume:
        assert digest(volume.pread(offset=0, length=volume.size)) == expected["live"]
        assert [s.name for s in volume.snapshots()] == list(expected["snapshots"])
        for snapshot in volume.snapshots():
            known = expected["snapshots"][snapshot.name]
            assert snapshot.id == known["id"]
            assert snapshot.info.lost_bytes == 0
            with snapshot.view() as view:
                assert digest(view.readall()) == known["content"]
            changed = volume.changed_since(snapshot)
            blocks = [b for start, end in changed for b in range(start // BLOCK, end // BLOCK)]
            assert blocks == known["changed_until_now"]


def test_names_contents_and_changes_are_what_they_were(golden_v2):
    assert index_files(golden_v2)
    assert merged_segments(golden_v2)
    check_contents(golden_v2)


def test_without_its_index_files_it_holds_the_same(golden_v2):
    for path in index_files(golden_v2):
        path.unlink()
    check_contents(golden_v2)


@pytest.mark.parametrize("place", [0, 100, PAGE + 1])
def test_a_damaged_index_file_changes_no_answer(golden_v2, place):
    """Whether it is seen when the volume is opened or when a page of it is read."""
    (path,) = index_files(golden_v2)
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    check_contents(golden_v2)


def test_a_merged_segment_stands_for_others_as_the_page_says(golden_v2):
    layout, more = table("log.md", "Segment header"), table("log.md", "Merged segment header")
    at = layout.offset("crc")  # where others have it, three more fields begin
    data = merged_segments(golden_v2)[0]
    header, merged = layout.decode(data), more.decode(data[at:])
    crc_at = at + more.offset("crc")
    assert merged["crc"] == crc32c(data[:crc_at])
    assert merged["first"] < merged["last"] < header["segment"]
    assert len(data) == merged["end_page"] * PAGE
    numbers = {int(path.stem, 16) for path in golden_v2.segments()}
    assert numbers.isdisjoint(range(int(merged["first"]), int(merged["last"]) + 1))


def number_at(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def test_an_index_file_is_its_tables(golden_v2):
    layout, page_layout = table("index.md", "Header"), table("index.md", "Page of entries")
    (path,) = index_files(golden_v2)
    data = path.read_bytes()
    header = layout.decode(data)
    assert (header["magic"], header["version"]) == (b"SBLOGIDX", 1)
    assert header["uuid"].hex() == golden_v2.expected["uuid"]
    assert header["number"] == int(path.stem, 16)
    assert header["crc"] == crc32c(data[: layout.offset("crc")])
    start = int(header["tables_page"]) * PAGE
    tables = data[start : start + int(header["tables_bytes"])]
    assert header["tables_crc"] == crc32c(tables)
    reader = Reader(tables)
    covers = [(reader.u32(), reader.u32()) for _ in range(reader.u32())]
    assert covers == sorted(covers)
    kinds = {0: 0, 1: 0, 2: 0, 3: 0}
    for level in range(CLASSES):
        for _ in range(reader.u32()):
            first = (reader.u64(), reader.u32())
            page = reader.u32()
            content = data[page * PAGE : (page + 1) * PAGE]
            found = page_layout.decode(content)
            name = header["uuid"] + int(header["number"]).to_bytes(4, "little")
            assert found["crc"] == crc32c(name + page.to_bytes(4, "little") + content[4:])
            block, at, keys = 0, page_layout.length, []
            for _ in range(int(found["count"])):
                more, at = number_at(content, at)
                block += more
                head, at = number_at(content, at)
                length, at = number_at(content, at)
                if head & 3 == 0:
                    at, length = at + 4, 1
                assert length <= 16**level
                assert level == 0 or length > 16 ** (level - 1)
                keys.append((block, head >> 2))
                kinds[head & 3] += 1
            assert keys == sorted(keys)
            assert keys[0] == first
            assert {epoch for _, epoch in keys} <= {epoch for epoch, _ in covers}
    assert reader.is_done
    assert sum(kinds.values()) == header["entries"]
    assert kinds[0] == header["preserved"] > 0
    assert kinds[1] > 0
    assert kinds[2] == header["lost"] == 0
