"""What is on disk is what docs/formats says: decoded with the tables of the pages themselves.

Twice: the golden store, so that the pages still describe old files, and one written just now, so
that the program still writes what the pages describe.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import time

import pytest

import stillblock
from compat.layout import PAGE, Reader, crc32c, journal_records, numbered_names, segment, table
from stillblock import native
from stillblock.errors import UnsupportedVersionError

BLOCK = 4096


def read_epoch_header(blob: bytes) -> dict[str, object]:
    layout = table("log.md", "Epoch header")
    fixed = layout.decode(blob)
    reader = Reader(blob)
    reader.raw(layout.length)
    found = {**fixed, "selection": reader.extents(), "restore_source": reader.u32()}
    found["restore_blocks"] = reader.extents() if found["restore_source"] else []
    found["meta"] = json.loads(reader.blob())
    assert reader.is_done
    return found


def segments_of(golden):
    return [segment(path.read_bytes(), block_size=BLOCK) for path in golden.segments()]


def test_the_checksum_is_castagnolis():
    assert crc32c(b"123456789") == 0xE3069283


def test_a_segment_header_is_its_table(golden):
    first = golden.segments()[0].read_bytes()[:PAGE]
    # By hand, without the page: the page's table must come to the same.
    magic, version, uuid, *numbers = struct.unpack_from("<8sI16sIIIIIQII", first)
    (crc,) = struct.unpack_from("<I", first, 64)
    found = table("log.md", "Segment header").decode(first)
    assert list(found.values()) == [magic, version, uuid, *numbers, crc]
    assert (magic, version) == (b"SBLOGSEG", 1)
    assert uuid.hex() == golden.expected["uuid"]
    assert numbers[:3] == [1, 1, 0]
    assert crc == crc32c(first[:64])
    assert not any(first[68:])


def test_a_batch_header_is_its_table(golden):
    data = golden.segments()[0].read_bytes()
    at = 2 * (1 + -(-struct.unpack_from("<I", data, 56)[0] // PAGE)) * PAGE
    magic, uuid, sequence, epoch, *counts = struct.unpack_from("<4s16sQIIIII", data, at)
    (crc,) = struct.unpack_from("<I", data, at + 60)
    found = table("log.md", "Batch header").decode(data[at:])
    assert list(found.values()) == [magic, uuid, sequence, epoch, *counts, bytes(12), crc]
    assert (magic, uuid.hex(), sequence, epoch) == (b"SBBH", golden.expected["uuid"], 1, 1)
    assert crc == crc32c(data[at : at + 60])
    assert counts[3] == crc32c(data[at + 64 : at + 64 + 16 * counts[0]])


def test_a_journal_record_is_its_table(golden):
    data = golden.journal.read_bytes()
    magic, version, sequence, kind, length, crc = struct.unpack_from("<4sIQIII", data)
    found = table("journal.md", "Record").decode(data)
    assert list(found.values()) == [magic, version, sequence, kind, length, crc]
    assert (magic, version, sequence, kind) == (b"SBJR", 1, 1, 1)
    assert crc == crc32c(data[:24] + data[28 : 28 + length])
    payload = Reader(data[28 : 28 + length])
    assert payload.raw(16).hex() == golden.expected["uuid"]
    assert payload.u32() == BLOCK
    assert payload.blob().endswith(b"/disk.img")
    identity = table("journal.md", "Kinds").decode(payload.raw(32))
    assert identity["bytes"] == golden.expected["size_bytes"]
    meta = json.loads(payload.blob())
    assert (meta["schema"], meta["kind"], meta["name"]) == ("stillblock/1", "volume-config", "web")
    assert payload.is_done


def test_every_epoch_of_the_golden_store_is_as_the_page_says(golden):
    segments = segments_of(golden)
    headers = [read_epoch_header(found.epoch_header) for found in segments]
    assert [h["epoch"] for h in headers] == [1, 2, 3, 4, 5]
    assert [h["predecessor"] for h in headers] == [0, 1, 2, 3, 4]
    assert {h["origin_bytes"] for h in headers} == {golden.expected["size_bytes"]}
    selections = [h["selection"] for h in headers]
    assert selections == [[(0, 21)], [(0, 8), (12, 21)], [(0, 21)], [(0, 4)], [(0, 21)]]
    names = [h["meta"]["name"] for h in headers]
    assert names[:4] == ["monday", "tuesday", "scrap", "wednesday"]
    restore = headers[4]
    assert restore["meta"]["purpose"] == "safety"
    assert (restore["restore_source"], restore["restore_blocks"]) == (1, [(1, 3)])
    for earlier, later in itertools.pairwise(segments):
        assert later.header["previous_segment"] == earlier.header["segment"]
    sequences = [b.header["sequence"] for found in segments for b in found.batches]
    assert sequences == list(range(1, len(sequences) + 1))


def test_every_kind_of_descriptor_is_where_the_story_put_it(golden):
    told = [
        (found.header["epoch"], d.kind, d.first_block, d.block_count)
        for found in segments_of(golden)
        for batch in found.batches
        for d in batch.descriptors
    ]
    assert {kind for _, kind, _, _ in told} == {
        "PRESERVE",
        "PRESERVE_ZERO",
        "CHANGED",
        "DONE",
    }
    assert (1, "PRESERVE_ZERO", 5, 1) in told  # it was zeros at monday
    assert (1, "PRESERVE", 20, 1) in told  # the partial last block
    assert (2, "PRESERVE", 9, 1) in told  # only monday selects it
    assert (4, "CHANGED", 9, 1) in told  # monday tracks it, and has its copy from epoch 2
    assert (5, "DONE", 1, 2) in told


def test_the_payload_of_a_deleted_snapshot_is_punched_and_no_other(golden):
    payloads = {
        (found.header["epoch"], d.first_block): d.payload
        for found in segments_of(golden)
        for batch in found.batches
        for d in batch.descriptors
        if d.payload is not None
    }
    punched = {key for key, payload in payloads.items() if not any(payload)}
    assert punched == {(3, 2)}  # block 2 as scrap knew it
    assert payloads[1, 20].endswith(bytes(BLOCK - 1536))  # past the end of the disk: zeros


def test_the_last_batch_of_a_closed_store_is_a_seal(golden):
    last = segments_of(golden)[-1].batches[-1]
    assert last.descriptors == ()
    assert last.header["payload_pages"] == 0


def test_every_journal_record_is_decoded_to_its_end(golden):
    records = journal_records(golden.journal.read_bytes())
    names = [record.name for record in records]
    assert names[:2] == ["Created", "Opened"]
    assert names[-1] == "Closed"
    for name in ("EpochMeta", "Deleted", "Freed", "Bookmarked", "RestoreEnded"):
        assert name in names
    boot_and_generation = Reader(records[1].payload)
    boot_and_generation.raw(16)
    assert boot_and_generation.u64() == 1
    assert boot_and_generation.blob().endswith(b"/disk.img")
    assert boot_and_generation.blob().endswith(f"{golden.expected['uuid']}.buffer".encode())
    deleted = next(record for record in records if record.name == "Deleted")
    assert Reader(deleted.payload).u32() == 3


def test_the_records_of_a_group_are_as_the_page_says(tmp_path):
    for name in ("data", "wal"):
        origin = tmp_path / f"{name}.img"
        origin.write_bytes(bytes(16 * BLOCK))
        store = tmp_path / name
        stillblock.create(name, origin=origin, store=store, state_dir=tmp_path / "s")
    data, wal = (stillblock.open(n, state_dir=tmp_path / "s") for n in ("data", "wal"))
    with data, wal:
        taken = stillblock.snapshot_group({data: "now", wal: "now"})
        group = taken[0].receipt.snapshot.group
    members, decided = [], []
    for name in ("data", "wal"):
        journal = (tmp_path / name / "journal").read_bytes()
        records = {record.name: record for record in journal_records(journal)}
        begun = Reader(records["GroupBegun"].payload)
        assert (begun.u32(), begun.raw(16).hex(), begun.u32()) == (1, group.id, 2)
        members.append([(begun.raw(16), begun.u32(), begun.blob()) for _ in range(2)])
        assert begun.is_done
        found = Reader(records["GroupDecided"].payload)
        decided.append((found.u32(), found.raw(16).hex(), found.u32()))
        assert found.is_done
    assert members[0] == members[1] == sorted(members[0])
    paths = {str(tmp_path / name).encode() for name in ("data", "wal")}
    assert {store for _, _, store in members[0]} == paths
    assert decided == [(1, group.id, 1)] * 2


def test_the_kinds_of_records_have_their_numbers():
    for page, heading, kinds in (
        ("journal.md", "Kinds", [*range(1, 23), 24, 25, 26, 27]),
        ("log.md", "Descriptor", [*range(1, 8)]),
    ):
        assert list(numbered_names(page, heading)) == kinds


# A store and a buffer written just now --------------------------------------------------------

WRITER = """
import os, pathlib, signal, sys
from stillblock import native
volume = native.Volume.open(pathlib.Path(sys.argv[1]), buffer_dir=pathlib.Path(sys.argv[2]))
volume.snapshot(selection=((0, 262144),), meta=b"opaque", pause_limit_ms=2000)
volume.pwrite(b"n" * 4096, offset=3 * 4096)
volume.pwrite(b"p" * 1024, offset=9 * 4096 + 512)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(tmp_path):
    """A volume whose server was killed right after two acknowledged writes."""
    origin, store, memory = tmp_path / "disk.img", tmp_path / "store", tmp_path / "memory"
    origin.write_bytes(b"o" * 262144)
    memory.mkdir()
    native.create_volume(store=store, origin=origin, block_size=BLOCK, meta=b"")
    ran = subprocess.run([sys.executable, "-c", WRITER, store, memory], check=False)
    assert ran.returncode == -signal.SIGKILL
    (buffer,) = memory.iterdir()
    return origin, store, memory, buffer


def test_a_new_segment_is_as_the_page_says(killed):
    _, store, memory, _ = killed
    with_writes = native.Volume.open(store, buffer_dir=memory)  # replays what was left
    assert with_writes.pread(offset=3 * BLOCK, length=1) == b"n"
    with_writes.close()
    (path,) = (store / "log").iterdir()
    found = segment(path.read_bytes(), block_size=BLOCK, punched_is_fine=False)
    told = [(d.kind, d.first_block, d.payload) for b in found.batches for d in b.descriptors]
    assert told == [("PRESERVE", 3, b"o" * BLOCK), ("PRESERVE", 9, b"o" * BLOCK)]
    journal_records((store / "journal").read_bytes())


def test_a_compacted_journal_is_as_the_page_says(tmp_path):
    """It says which numbers were given out, and nothing else of what is gone."""
    origin, store, memory = tmp_path / "disk.img", tmp_path / "store", tmp_path / "memory"
    origin.write_bytes(b"o" * 262144)
    memory.mkdir()
    native.create_volume(store=store, origin=origin, block_size=BLOCK, meta=b"first")
    volume = native.Volume.open(store, buffer_dir=memory)

    def snapshot() -> int:
        return volume.snapshot(selection=((0, 262144),), meta=b"", pause_limit_ms=2000).epoch

    assert [snapshot() for _ in range(4)] == [1, 2, 3, 4]
    for epoch in (1, 2, 4):
        volume.delete_snapshot(epoch=epoch)
    for size in range(12):
        volume.set_meta(bytes([size]) * 512 * 1024)
    deadline = time.monotonic() + 60
    while (store / "journal").stat().st_size > 4 << 20:
        assert time.monotonic() < deadline, "it is never compacted"
        volume.delete_snapshot(epoch=snapshot())  # an instant lets upkeep look
    volume.set_meta(b"last")
    volume.close()
    records = journal_records((store / "journal").read_bytes())
    names = [record.name for record in records]
    assert names[:2] == ["Compacted", "Created"]
    assert names[-1] == "Closed"
    assert "Freed" in names
    versions = {record.name: record.header["version"] for record in records}
    assert (versions["Compacted"], versions["Created"], versions["VolumeMeta"]) == (3, 1, 1)
    first = Reader(records[0].payload)
    epoch_max, restoring = first.u32(), first.u32()
    gone, aborted = first.packed_extents(), first.packed_extents()
    assert first.is_done
    assert (restoring, aborted) == (0, [])
    assert gone[0] == (1, 3)
    assert 4 <= gone[1][0] < gone[-1][1] <= epoch_max + 1
    assert records[-1].header["sequence"] > 4 + 3 + 12, "numbers go on"
    volume = native.Volume.open(store, buffer_dir=memory)
    assert volume.meta() == b"last"
    assert [info.epoch for info in volume.epochs()] == [3]
    assert snapshot() > epoch_max
    volume.close()


def test_a_buffer_file_is_its_tables(killed):
    origin, store, _, path = killed
    data = path.read_bytes()
    layout, slot_layout = table("buffer.md", "File header"), table("buffer.md", "Slot header")
    header = layout.decode(data)
    uuid, *_ = native.peek(store)
    assert (header["magic"], header["version"]) == (b"SBBUFFER", 2)
    assert (header["uuid"].hex(), header["generation"]) == (uuid, 1)
    assert header["origin_inode"] == origin.stat().st_ino
    assert header["origin_bytes"] == origin.stat().st_size
    assert header["block_size"] == BLOCK
    assert header["crc"] == crc32c(data[: layout.offset("crc")])
    assert path.name == f"stillblock-{uuid}.buffer"
    assert header["regions_crc"] == crc32c(data[: layout.offset("regions_crc")])
    assert header["region_count"] == 1, "one for each mebibyte of the disk"
    slots_bytes = int(header["slot_count"]) * slot_layout.length
    regions_at = PAGE + slots_bytes + -slots_bytes % PAGE
    data_at = regions_at + PAGE
    assert not any(data[regions_at:data_at]), "a snapshot needs every block: no region is open"
    assert len(data) == data_at + int(header["slot_count"]) * BLOCK
    alive_unix_ns = int.from_bytes(data[192:200], "little")
    assert abs(alive_unix_ns - path.stat().st_mtime_ns) < 3600 * 10**9

    # A slot that the committer has brought home is free, and still says what it was.
    slots = [slot_layout.decode(data[PAGE + i * slot_layout.length :]) for i in range(2)]
    for index, (slot, block, mask, content) in enumerate(
        zip(slots, (3, 9), (0xFF, 0b110), (b"n", b"p"), strict=True)
    ):
        at = PAGE + index * slot_layout.length
        assert slot["state"] in (b"LIVE", bytes(4))
        assert (slot["block"], slot["sequence"], slot["epoch"]) == (block, index + 1, 1)
        assert slot["sectors"] == mask
        assert slot["crc"] == crc32c(data[at + 4 : at + slot_layout.offset("crc")])
        assert slot["reserved"] == bytes(20)
        sectors = data[data_at + index * BLOCK :][:BLOCK]
        first = (mask & -mask).bit_length() - 1
        assert sectors[first * 512 : (first + mask.bit_count()) * 512] == content * (
            512 * mask.bit_count()
        )


def test_a_buffer_of_a_newer_version_is_not_replayed_unasked(killed):
    origin, store, memory, path = killed
    layout = table("buffer.md", "File header")
    data = bytearray(path.read_bytes())
    data[8:12] = (3).to_bytes(4, "little")
    crc_at = layout.offset("crc")
    data[crc_at : crc_at + 4] = crc32c(bytes(data[:crc_at])).to_bytes(4, "little")
    path.write_bytes(data)
    before = origin.read_bytes()
    with pytest.raises(UnsupportedVersionError, match="version 3"):
        native.Volume.open(store, buffer_dir=memory)
    assert path.read_bytes() == data
    assert origin.read_bytes() == before
    native.Volume.open(store, buffer_dir=memory, recover="discard").close()


def test_a_killed_server_is_recovered_by_the_next_opening_without_being_asked(killed):
    origin, store, memory, path = killed
    volume = native.Volume.open(store, buffer_dir=memory)
    (epoch,) = volume.epochs()
    with_view = volume.view(epoch=epoch.epoch)
    assert with_view.pread(offset=0, length=262144) == b"o" * 262144
    with_view.close()
    volume.close()
    assert not path.exists()
    content = bytearray(b"o" * 262144)
    content[3 * BLOCK : 4 * BLOCK] = b"n" * BLOCK
    content[9 * BLOCK + 512 : 9 * BLOCK + 1536] = b"p" * 1024
    assert origin.read_bytes() == content
    assert os.listdir(memory) == []
