"""Clones under the real server: written by real clients, killed, restarted, moved, damaged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from serving import BLOCK, MIB, Served, pattern, try_run, volume
from stillblock.demo.nbd_client import NbdError
from stillblock.model import CloneState
from stillblock.operations.clones import CloneRequest
from stillblock.operations.promotion import PromoteRequest

SIZE = 4 * MIB


@pytest.fixture
def served() -> Iterator[Served]:
    """A disk of 4 MiB with the snapshot `monday` and two clones of it, served."""
    with volume(pattern(1, SIZE)) as made:
        made.start()
        made.snapshot("monday")
        for name in ("one", "two"):
            made.cli("clone", "create", f"web@monday+{name}")
        yield made


def exports(served: Served) -> dict[str, bytes]:
    """Everything that can be read of the live disk, the snapshot and the second clone."""
    return {name or "web": served.read(name) for name in (None, "monday", "monday+two")}


def test_what_is_written_to_a_clone_is_nowhere_else_and_outlives_restarts_and_kills(served):
    before = exports(served)
    assert served.read("monday+one") == before["monday"] == pattern(1, SIZE)
    wanted = bytearray(before["monday"])
    with served.client("monday+one") as client:
        assert not client.is_read_only
        for offset, length in ((0, BLOCK), (3 * BLOCK + 512, 1024), (MIB - 100, 70_000)):
            data = pattern(offset + 7, length)
            client.pwrite(data, offset=offset)
            wanted[offset : offset + length] = data
        assert client.pread(offset=0, length=SIZE) == wanted
        client.flush()
    assert exports(served) == before
    served.stop()
    assert served.origin.read_bytes() == before["web"]
    served.start()
    assert served.read("monday+one") == wanted
    with served.client("monday+one") as client:
        client.pwrite(b"acknowledged, never flushed".ljust(BLOCK), offset=2 * MIB)
        wanted[2 * MIB : 2 * MIB + BLOCK] = b"acknowledged, never flushed".ljust(BLOCK)
        client.pwrite(b"in place", offset=10)
        wanted[10:18] = b"in place"
        served.kill()
    served.start()
    assert served.read("monday+one") == wanted
    assert exports(served) == before
    with served.session() as session:
        taken = session.show_clone("monday", "one").stored_bytes
        assert taken >= 70_000
        files = served.store / "clones"
        space = sum(path.stat().st_blocks for path in files.iterdir()) * 512
        assert session.delete_clone("monday", "one").freed_bytes == taken
        assert sum(path.stat().st_blocks for path in files.iterdir()) * 512 == space - taken
    assert exports(served) == before


def test_the_live_disk_and_the_snapshot_go_their_own_ways_under_a_clone(served):
    monday = pattern(1, SIZE)
    with served.client("monday+one") as clone, served.client() as live:
        clone.pwrite(b"C" * BLOCK, offset=BLOCK)
        live.pwrite(b"L" * 3 * BLOCK, offset=0)
        live.flush()
        clone.pwrite(b"c" * 100, offset=2 * BLOCK + 50)
        assert clone.pread(offset=0, length=BLOCK) == monday[:BLOCK]
        assert clone.pread(offset=BLOCK, length=BLOCK) == b"C" * BLOCK
        third = bytearray(monday[2 * BLOCK : 3 * BLOCK])
        third[50:150] = b"c" * 100
        assert clone.pread(offset=2 * BLOCK, length=BLOCK) == third
        assert live.pread(offset=0, length=3 * BLOCK) == b"L" * 3 * BLOCK
    assert served.read("monday") == served.read("monday+two") == monday


def test_a_clone_in_use_is_neither_reset_nor_deleted_unless_forced(served):
    with served.client("monday+one") as client:
        client.pwrite(b"x" * BLOCK, offset=0)
        for verb in ("reset", "delete"):
            refused = served.try_cli("clone", verb, "web@monday+one", "--yes")
            assert (refused.code, "in use" in refused.err) == (1, True), refused
        refused = served.try_cli("snapshot", "delete", "web@monday", "--yes")
        assert (refused.code, "2 clones: one, two" in refused.err) == (1, True), refused
        assert client.pread(offset=0, length=BLOCK) == b"x" * BLOCK
        served.cli("clone", "reset", "web@monday+one", "--yes", "--force")
    assert served.read("monday+one") == pattern(1, SIZE)
    served.cli("snapshot", "delete", "web@monday", "--yes", "--force")
    shown = served.cli("status", "--json").json["volumes"][0]
    assert [export["name"] for export in shown["exports"]] == ["web"]
    assert shown["clones"]["clones"] == []
    assert not list((served.store / "clones").iterdir())


def test_a_store_that_is_imported_elsewhere_brings_its_clones(served):
    with served.client("monday+one") as client:
        client.pwrite(b"kept" * 1024, offset=MIB)
    served.stop()
    shutil.rmtree(served.folder / "s")
    served.cli("volume", "import", str(served.store), "--name", "web")
    served.start()
    found = served.cli("clone", "list", "web", "--json").json
    assert [(c["name"], c["state"]) for c in found["clones"]] == [("one", "ok"), ("two", "ok")]
    with served.client("monday+one") as client:
        assert client.pread(offset=MIB, length=BLOCK) == b"kept" * 1024


def test_files_of_clones_that_never_came_or_went_are_removed(served):
    served.stop()
    files = served.store / "clones"
    known = sorted(path.name for path in files.iterdir())
    for name in ("00000009.map.new", "00000009-00000001.data", "00000001-00000007.recent"):
        (files / name).write_bytes(b"left over")
    (files / "notes.txt").write_text("not ours")
    served.start()
    assert sorted(path.name for path in files.iterdir()) == sorted([*known, "notes.txt"])


def test_a_clone_that_cannot_be_read_is_told_and_harms_nobody_else(served):
    with served.client("monday+one") as client:
        client.pwrite(b"x" * BLOCK, offset=0)
        client.flush()
        client.pwrite(b"y" * BLOCK, offset=BLOCK)
        client.flush()
    served.stop()
    path = served.store / "clones" / "00000001.map"
    content = bytearray(path.read_bytes())
    # Both copies of the first record of what is the clone's own; a later one proves it was there.
    second = content.index(b"SBCR", content.index(b"SBCR", 8192) + 4)
    for at in range(second, len(content)):
        if content[at : at + 12] == b"SBCR" + (2).to_bytes(8, "little"):
            content[at + 30] ^= 0x10
    path.write_bytes(content)
    served.start()
    listed = served.try_cli("clone", "list", "web", "--json")
    assert listed.code == 3
    states = {c["number"]: (c["name"], c["state"]) for c in listed.json["clones"]}
    assert states == {1: ("clone-1", "damaged"), 2: ("two", "ok")}
    checked = served.try_cli("volume", "check", "web")
    assert checked.code in (3, 4)
    assert "clone" in checked.out
    assert served.read("monday+two") == served.read("monday") == pattern(1, SIZE)
    served.cli("clone", "delete", "web@?+clone-1", "--yes")
    assert served.cli("clone", "list", "web", "--json").json["clones"][0]["name"] == "two"
    assert len(list((served.store / "clones").iterdir())) == 3


def test_one_bad_sector_of_a_map_loses_nothing(served):
    with served.client("monday+one") as client:
        for number in range(4):
            client.pwrite(pattern(number, BLOCK), offset=2 * number * BLOCK)
            client.flush()
    wanted = served.read("monday+one")
    served.stop()
    path = served.store / "clones" / "00000001.map"
    content = path.read_bytes()
    for at in range(0, len(content), 512):
        path.write_bytes(content[:at] + bytes(512) + content[at + 512 :])
        with served.session() as session:
            info = session.show_clone("monday", "one")
            assert info.state is CloneState.OK, at
            assert info.own_bytes == 4 * BLOCK, at
    path.write_bytes(content)
    served.start()
    assert served.read("monday+one") == wanted


def test_a_clone_leaves_room_for_the_originals_that_snapshots_need():
    with volume(pattern(1, 32 * MIB), "--store-limit", "24MiB") as made:
        made.start()
        made.snapshot("monday")
        made.cli("clone", "create", "web@monday+big")
        with made.client("monday+big") as client:
            written = 0
            with pytest.raises(NbdError, match="error 28"):
                for offset in range(0, 32 * MIB, MIB):
                    client.pwrite(pattern(offset, MIB), offset=offset)
                    written += MIB
            assert 8 * MIB <= written <= 21 * MIB
        with made.client() as live:
            live.pwrite(pattern(9, MIB), offset=0)
            live.flush()
        with made.session() as session:
            assert session.show_snapshot("monday").lost_bytes == 0
            assert session.show_clone("monday", "big").state is CloneState.OK
        assert made.read("monday") == pattern(1, 32 * MIB)
        with made.client("monday+big") as client:
            assert client.pread(offset=0, length=written) == b"".join(
                pattern(offset, MIB) for offset in range(0, written, MIB)
            )


def test_a_partial_snapshot_gives_errors_through_its_clone_until_written():
    with volume(pattern(1, 16 * MIB), "--store-limit", "4MiB") as made:
        made.start()
        made.snapshot("monday")
        made.cli("clone", "create", "web@monday+x")
        with made.client() as live:
            for offset in range(0, 12 * MIB, MIB):
                live.pwrite(pattern(2, MIB), offset=offset)
            live.flush()
        with made.session() as session:
            start, end = session.show_snapshot("monday").lost[0]
        assert end - start >= BLOCK
        with made.client("monday+x") as clone, pytest.raises(NbdError, match="error 5"):
            clone.pread(offset=start, length=BLOCK)
        with made.client("monday+x") as clone, pytest.raises(NbdError, match="error 5"):
            clone.pwrite(b"x" * 100, offset=start)
        with made.client("monday+x") as clone:
            # Zeroing takes no room.
            wrote = try_run(
                "qemu-io", "-f", "raw", "-c", f"write -z -u {start} 4096", made.uri("monday+x")
            )
            assert wrote.code == 0, wrote
            assert clone.pread(offset=start, length=BLOCK) == bytes(BLOCK)


def test_two_hundred_clones_cost_kilobytes_and_open_in_milliseconds():
    with volume(pattern(1, SIZE)) as made:
        made.snapshot("monday")
        with made.session() as session:
            for number in range(200):
                session.create_clone(CloneRequest(snapshot="monday", name=f"n{number}"))
            assert session.list_clones().stored_bytes <= 200 * 32 * 1024
        made.start()
        found = made.cli("status", "--json").json["volumes"][0]
        assert len(found["exports"]) == 202
        assert made.read("monday+n199") == pattern(1, SIZE)


def test_a_copy_that_a_stop_breaks_off_leaves_no_image_and_the_clone(served):
    image = served.folder / "new.img"
    with served.session() as session:
        request = PromoteRequest(snapshot="monday", clone="one", path=str(image))
        session.start_promotion(request)
    stopped = served.stop()
    assert stopped.code == 0, stopped
    assert not list(served.folder.glob("new.img.partial"))
    # It may have been faster than the stop: then it is there, and whole.
    assert not image.exists() or image.read_bytes() == pattern(1, SIZE)
    served.start()
    assert served.read("monday+one") == pattern(1, SIZE)
