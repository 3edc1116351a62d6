"""A killed server, and an origin that others wrote to since: people see it, and decide."""

from __future__ import annotations

import os
import time

import pytest

from serving import BLOCK, MIB, pattern, volume

pytestmark = pytest.mark.slow


@pytest.fixture
def touched():
    """A server killed with two blocks in its buffer; somebody wrote the origin afterwards."""
    before = pattern(70, MIB)
    with volume(before) as served:
        served.start()
        served.snapshot("monday")
        with served.client() as client:
            client.pwrite(b"A" * BLOCK, offset=0)
            client.pwrite(b"B" * BLOCK, offset=5 * BLOCK)
            # The committer runs at 50 ms; the process is stopped before.
            os.kill(served.process.pid, 19)
        served.kill()
        with served.origin.open("r+b") as disk:
            disk.seek(100 * BLOCK)
            disk.write(b"C" * BLOCK)
        later = time.time() + 3600  # as if it had been written an hour after
        os.utime(served.origin, (later, later))
        yield served, before


def test_what_was_left_is_listed_and_nothing_is_done_unasked(touched):
    served, _ = touched
    ran = served.try_cli("snapshot", "list", "web")
    assert ran.code == 1
    assert "recover web --replay" in ran.err
    state = {p: p.read_bytes() for p in (served.origin, served.store / "journal")}
    plan = served.cli("volume", "recover", "web", "--replay", "--dry-run", "--json").json
    assert plan["left_as"] == "killed"
    assert plan["is_touched"]
    if plan["slots"]:
        assert plan["write_bytes"] == plan["slots"] * BLOCK
        assert {tuple(e) for e in plan["differing"]} <= {(0, BLOCK), (5 * BLOCK, 6 * BLOCK)}
    asked = served.try_cli("volume", "recover", "web", "--discard")
    assert asked.code == (2 if plan["slots"] else 0)
    if plan["slots"]:
        assert {p: p.read_bytes() for p in state} == state


@pytest.mark.parametrize("how", ["--replay", "--discard"])
def test_a_decision_is_done_and_what_others_wrote_makes_snapshots_suspect(touched, how):
    served, before = touched
    plan = served.cli("volume", "recover", "web", how, "--dry-run", "--json").json
    ran = served.cli("volume", "recover", "web", how, "--yes")
    assert "suspect" in ran.err
    content = served.origin.read_bytes()
    assert content[100 * BLOCK : 101 * BLOCK] == b"C" * BLOCK
    if how == "--replay" or not plan["slots"]:
        assert content[:BLOCK] == b"A" * BLOCK
        assert content[5 * BLOCK : 6 * BLOCK] == b"B" * BLOCK
    else:
        assert content[:BLOCK] == before[:BLOCK]
    assert "SUSPECT" in served.cli("snapshot", "list", "web").out
    assert "web@monday is SUSPECT" in served.cli("ls", "web@monday").err
    assert served.try_cli("volume", "check", "web").code == 3
    preview = served.cli("volume", "recover", "web", "--accept-origin", "--dry-run")
    assert "monday" in preview.out
    assert "SUSPECT" in served.cli("snapshot", "list", "web").out
    served.cli("volume", "recover", "web", "--accept-origin", "--yes", "--note", "it was me")
    assert "SUSPECT" not in served.cli("snapshot", "list", "web").out
    assert "it was me" in served.cli("snapshot", "receipt", "web@monday").out
    assert served.cli("volume", "check", "web", "--data").code == 0


def test_what_was_left_can_be_seen_before_there_is_a_decision(touched):
    served, _ = touched
    state = {p: p.read_bytes() for p in (served.origin, served.store / "journal")}
    plan = served.cli("volume", "recover", "web", "--dry-run", "--json").json
    decided = served.cli("volume", "recover", "web", "--discard", "--dry-run", "--json").json
    assert plan == decided | {"how": None}
    assert "was killed" in served.cli("volume", "recover", "web", "--dry-run").out
    assert {p: p.read_bytes() for p in state} == state


def test_one_decision_at_a_time(touched):
    served, _ = touched
    assert served.try_cli("volume", "recover", "web").code == 2
    assert served.try_cli("volume", "recover", "web", "--replay", "--discard").code == 2


def test_a_store_moved_to_another_place_is_imported_with_what_it_holds():
    with volume(pattern(71, MIB)) as served:
        served.snapshot("monday")
        served.snapshot("tuesday")
        served.cli("volume", "remove", "--keep-store", "web", "--yes")
        moved, disk = served.folder / "moved", served.folder / "moved.img"
        served.store.rename(moved)
        served.origin.rename(disk)
        words = ["volume", "import", str(moved), "--origin", str(disk)]
        plan = served.cli(*words, "--dry-run", "--json").json
        assert [s["name"] for s in plan["snapshots"]] == ["monday", "tuesday"]
        assert plan["is_same_origin"]
        assert served.cli("volume", "list", "--json").json["volumes"] == []
        ran = served.cli(*words)
        assert "web@monday" in ran.out
        assert served.cli("volume", "list", "--json").json["volumes"][0]["origin"] == str(disk)
        assert "SUSPECT" not in served.cli("snapshot", "list", "web").out
        moved.rename(served.store)  # where the fixture looks for what to clean up


@pytest.mark.parametrize("size", [MIB // 2, 2 * MIB])
def test_an_origin_of_another_size_is_refused(size):
    with volume(pattern(72, MIB)) as served:
        served.cli("volume", "remove", "--keep-store", "web", "--yes")
        other = served.folder / "other.img"
        other.write_bytes(bytes(size))
        ran = served.try_cli("volume", "import", str(served.store), "--origin", str(other))
        assert ran.code == 1
        assert "does not fit" in ran.err
        assert other.read_bytes() == bytes(size)
        assert served.cli("volume", "list", "--json").json["volumes"] == []


def test_a_store_with_a_damaged_journal_can_be_let_go_of():
    with volume(pattern(73, MIB)) as served:
        served.snapshot("monday")
        journal = served.store / "journal"
        data = bytearray(journal.read_bytes())
        data[40] ^= 1
        journal.write_bytes(data)
        ran = served.try_cli("volume", "check", "web")
        assert ran.code == 4
        assert "remove --keep-store" in ran.err
        assert served.cli("volume", "remove", "--keep-store", "web", "--yes").code == 0
        data[40] ^= 1
        journal.write_bytes(data)  # the fixture reads it
