"""A store that an older version left is opened by this one, and holds what it held."""

from __future__ import annotations

import hashlib

import pytest

from compat.layout import journal_records, seal_journal_record, seal_segment_header, table
from stillblock.errors import StillblockError, StoreDamagedError, UnsupportedVersionError

BLOCK = 4096


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blocks(extents) -> list[int]:
    return [block for start, end in extents for block in range(start // BLOCK, -(-end // BLOCK))]


def as_if_never_moved(golden) -> None:
    """Write into the journal that the origin was this very file when the volume was closed."""
    identity = table("journal.md", "Kinds")  # the table of `identity` follows the kinds
    data = bytearray(golden.journal.read_bytes())
    closed = journal_records(bytes(data))[-1]
    assert closed.name == "Closed"
    status = golden.origin.stat()
    now = {
        "device": status.st_dev,
        "inode": status.st_ino,
        "bytes": status.st_size,
        "modified_unix_ns": status.st_mtime_ns,
    }
    payload = b"".join(
        now[field.name].to_bytes(field.length, "little") for field in identity.fields
    )
    assert len(payload) + 8 == len(closed.payload)  # and next_batch, which stays
    start = closed.at + table("journal.md", "Record").length
    data[start : start + len(payload)] = payload
    record = data[closed.at :]
    seal_journal_record(record)
    data[closed.at :] = record
    golden.journal.write_bytes(data)


def test_names_contents_and_changes_are_what_they_were(golden):
    expected = golden.expected
    with golden.open() as volume:
        assert volume.size == expected["size_bytes"]
        assert digest(volume.pread(offset=0, length=volume.size)) == expected["live"]
        assert [s.name for s in volume.snapshots()] == list(expected["snapshots"])
        for snapshot in volume.snapshots():
            known = expected["snapshots"][snapshot.name]
            assert snapshot.id == known["id"]
            assert blocks(snapshot.receipt.extents) == known["selected"]
            assert snapshot.info.lost_bytes == 0
            with snapshot.view() as view:
                assert digest(view.readall()) == known["content"]
            assert blocks(volume.changed_since(snapshot)) == known["changed_until_now"]
        assert {b.name: blocks(volume.changed_since(b)) for b in volume.bookmarks()} == expected[
            "bookmarks"
        ]


def test_a_copied_volume_is_suspect_and_says_why(golden):
    """Its origin has another inode: nobody can know that the copy is faithful."""
    with golden.open() as volume:
        infos = [snapshot.info for snapshot in volume.snapshots()]
    assert all(info.is_suspect for info in infos)
    assert "outside" in infos[0].suspect_reason


def test_an_origin_that_is_as_it_was_leaves_no_doubt(golden):
    as_if_never_moved(golden)
    with golden.open() as volume:
        assert not any(snapshot.info.is_suspect for snapshot in volume.snapshots())


def test_an_old_store_is_written_on(golden):
    """First changes, a snapshot, a restore and a deletion, on top of what an old version wrote."""
    with golden.open() as volume:
        before = volume.pread(offset=0, length=volume.size)
        new = volume.snapshot("now")
        volume.pwrite(b"x" * volume.size, offset=0)
        volume.flush()
        for name, known in golden.expected["snapshots"].items():
            with volume.find(name).view() as view:
                assert digest(view.readall()) == known["content"]
        volume.find("monday").delete()
        new.restore()
        assert volume.pread(offset=0, length=volume.size) == before
    with stillblock_again() as volume, volume.find("tuesday").view() as view:
        assert digest(view.readall()) == golden.expected["snapshots"]["tuesday"]["content"]


def stillblock_again():
    import stillblock

    return stillblock.open("web")


def test_a_newer_segment_is_refused(golden):
    layout = table("log.md", "Segment header")
    path = golden.segments()[-1]
    data = bytearray(path.read_bytes())
    at = layout.offset("version")
    data[at : at + 4] = (4).to_bytes(4, "little")
    seal_segment_header(data)
    path.write_bytes(data)
    with pytest.raises(UnsupportedVersionError, match="format version 4 is newer"):
        golden.open()


def test_a_newer_journal_record_is_refused(golden):
    layout = table("journal.md", "Record")
    data = bytearray(golden.journal.read_bytes())
    last = journal_records(bytes(data))[-1]
    at = last.at + layout.offset("version")
    data[at : at + 4] = (4).to_bytes(4, "little")
    record = data[last.at :]
    seal_journal_record(record)
    data[last.at :] = record
    golden.journal.write_bytes(data)
    with pytest.raises(UnsupportedVersionError, match="journal version 4 is newer"):
        golden.open()


def test_newer_metadata_of_a_volume_is_refused(golden):
    data = golden.journal.read_bytes()
    created = journal_records(data)[0]
    assert created.payload.count(b'"stillblock/1"') == 1
    record = bytearray(data.replace(b'"stillblock/1"', b'"stillblock/2"', 1))
    first = record[: journal_records(data)[1].at]
    seal_journal_record(first)
    record[: len(first)] = first
    golden.journal.write_bytes(record)
    with pytest.raises(UnsupportedVersionError, match="stillblock/2"):
        golden.open()


def test_opening_what_is_refused_changes_nothing(golden):
    layout = table("log.md", "Segment header")
    path = golden.segments()[0]
    data = bytearray(path.read_bytes())
    data[layout.offset("version")] = 9
    seal_segment_header(data)
    path.write_bytes(data)
    before = {p: p.read_bytes() for p in [golden.origin, golden.journal, *golden.segments()]}
    with pytest.raises(UnsupportedVersionError):
        golden.open()
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("damage", ["removed", "emptied"])
@pytest.mark.parametrize("place", range(5))
def test_a_segment_that_is_gone_gives_errors_never_the_origins_bytes(golden, place, damage):
    """A snapshot may be lost with its segment; what is still listed is right or an error (P2)."""
    as_if_never_moved(golden)
    expected = golden.expected["snapshots"]
    segments = golden.segments()
    assert len(segments) == 5
    if damage == "removed":
        segments[place].unlink()
    else:
        segments[place].write_bytes(b"")
    with golden.open() as volume:
        listed = volume.snapshots()
        older = [s for s in listed if s.info.epoch <= place]
        assert all(snapshot.info.is_suspect for snapshot in older)
        # Without its header it is listed as damaged, if the journal speaks of it: not of a safety
        # snapshot then.
        vanished = expected.keys() - {snapshot.name for snapshot in listed}
        assert all(name.startswith("before-restore-") for name in vanished)
        for snapshot in listed:
            try:
                view = snapshot.view()
            except StoreDamagedError:
                continue
            with view:
                content = read_what_can_be_read(view)
            assert content is None or digest(content) == expected[snapshot.name]["content"]


def read_what_can_be_read(view) -> bytes | None:
    """The whole snapshot, or nothing if any block of it gives an error."""
    whole = bytearray()
    for at in range(0, view.size, BLOCK):
        try:
            whole += view.pread(offset=at, length=min(BLOCK, view.size - at))
        except StillblockError:
            return None
    return bytes(whole)
