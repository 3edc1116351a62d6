"""kill -9 of the real serve process: what was acknowledged is there, and every snapshot exact."""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from serving import BLOCK, MIB, Served, pattern, volume
from stillblock import native
from stillblock.demo.nbd_client import NbdClient, NbdError
from stillblock.errors import StillblockError
from stillblock.model import RuleTerm
from stillblock.operations.restore import RestoreRequest
from stillblock.operations.snapshots import SnapshotRequest

pytestmark = pytest.mark.slow

DISK_BYTES = 16 * MIB
WRITERS = 3
SNAPSHOTS_MAX = 4
WAIT_S = 60.0
EXCLUDED = slice(4 * MIB, 6 * MIB)
HOUR_NS = 3600 * 10**9


@dataclass
class Writer:
    """Writes into its own part of the disk, and knows what was acknowledged and what may be."""

    disk: bytearray
    start: int
    end: int
    dice: random.Random
    acknowledged: int = 0
    #: Blocks of every write that was asked for, and of every one that was acknowledged.
    asked_blocks: set[int] = field(default_factory=set)
    written_blocks: set[int] = field(default_factory=set)
    in_flight: tuple[int, bytes] | None = None
    error: BaseException | None = None
    counted: threading.Condition = field(default_factory=threading.Condition)

    def run(self, client: NbdClient) -> None:
        """Write until the server is gone."""
        try:
            with client:
                while True:
                    self.write_once(client)
        except (NbdError, OSError):
            pass  # killed, as it should be
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            self.error = error
        with self.counted:
            self.counted.notify_all()

    def write_once(self, client: NbdClient) -> None:
        size = self.dice.choice([1, 512, 700, BLOCK, BLOCK, 3 * BLOCK, 9000, 70_000, 300 << 10])
        offset = self.start + self.dice.randrange(self.end - self.start - size)
        if self.dice.random() < 0.7:
            offset = offset // BLOCK * BLOCK
        data = self.dice.randbytes(size)
        blocks = range(offset // BLOCK, (offset + size - 1) // BLOCK + 1)
        self.in_flight = (offset, data)
        self.asked_blocks.update(blocks)
        client.pwrite(data, offset=offset)
        self.disk[offset : offset + size] = data
        self.written_blocks.update(blocks)
        self.in_flight = None
        if self.dice.random() < 0.05:
            client.flush()
        with self.counted:
            self.acknowledged += 1
            self.counted.notify_all()

    def wait_for(self, count: int) -> None:
        with self.counted:
            reached = self.counted.wait_for(
                lambda: self.acknowledged >= count or self.error, timeout=WAIT_S
            )
        assert reached

    def settle(self, disk: bytes) -> None:
        """The request that nobody acknowledged may have happened, in part, or not."""
        if self.in_flight is None:
            return
        offset, data = self.in_flight
        for at, byte in enumerate(data, start=offset):
            assert disk[at] in (self.disk[at], byte), f"byte {at} was never written"
        self.disk[offset : offset + len(data)] = disk[offset : offset + len(data)]
        self.in_flight = None


def same(got: bytes, expected: bytes | bytearray, what: str) -> None:
    """Compare without printing megabytes."""
    if got != expected:
        bad = [
            at // BLOCK
            for at in range(0, len(expected), BLOCK)
            if got[at : at + BLOCK] != expected[at : at + BLOCK]
        ]
        raise AssertionError(f"{what}: {len(bad)} blocks differ: {bad[:20]}")


def killed_while_writing(served: Served, disk: bytearray, dice: random.Random) -> list[Writer]:
    """Write from several clients until some point; kill the server, and tell who wrote what."""
    share = DISK_BYTES // WRITERS // BLOCK * BLOCK
    writers = [
        Writer(disk=disk, start=w * share, end=(w + 1) * share, dice=random.Random(dice.random()))
        for w in range(WRITERS)
    ]
    threads = [threading.Thread(target=w.run, args=(served.client(),)) for w in writers]
    for thread in threads:
        thread.start()
    writers[0].wait_for(dice.choice([1, 5, 40, 200]))
    served.kill()
    for thread in threads:
        thread.join()
    assert [w.error for w in writers if w.error] == []
    return writers


def one_round(
    served: Served, disk: bytearray, snapshots: dict[str, bytes], dice: random.Random, number: int
) -> None:
    """Take a snapshot, write from several clients, kill, start, and look at everything."""
    with served.session() as session:
        if len(snapshots) == SNAPSHOTS_MAX:
            gone = dice.choice(sorted(snapshots))
            session.delete_snapshot(gone)
            del snapshots[gone]
        terms = (RuleTerm(include=False, text="4MiB-6MiB"),) if number % 2 else ()
        session.create_snapshot(SnapshotRequest(name=f"s{number}", terms=terms))
        content = bytearray(disk)
        if terms:
            content[EXCLUDED] = bytes(2 * MIB)
        snapshots[f"s{number}"] = bytes(content)
    writers = killed_while_writing(served, disk, dice)
    served.start()
    live = served.read()
    for writer in writers:
        writer.settle(live)
    same(live, disk, "the live disk")
    for name, content in snapshots.items():
        same(served.read(name), content, name)
    with served.session() as session:
        listed = session.list_snapshots().snapshots
        assert {info.name for info in listed} == set(snapshots)
        assert not [info.name for info in listed if info.is_suspect or info.lost_bytes]
        since = f"s{number}"
        changed = session.changes(since=since).extents
        covered = bytearray(DISK_BYTES)
        for start, end in changed:
            covered[start:end] = b"\x01" * (end - start)
        for at in range(0, DISK_BYTES, BLOCK):
            is_left_out = number % 2 and EXCLUDED.start <= at < EXCLUDED.stop
            if disk[at : at + BLOCK] != snapshots[since][at : at + BLOCK] and not is_left_out:
                assert covered[at], f"the change of byte {at} was missed"


def rounds(count: int, seed: int, *options: str) -> None:
    dice = random.Random(seed)
    disk = bytearray(pattern(seed, DISK_BYTES))
    snapshots: dict[str, bytes] = {}
    with volume(bytes(disk)) as served:
        served.start(*options)
        for number in range(count):
            one_round(served, disk, snapshots, dice, number)
        assert served.stop().code == 0
        same(served.origin.read_bytes(), disk, "the origin after a clean stop")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("count", "options"), [(14, ()), (4, ("--cache", "writethrough")), (4, ("--direct",))]
)
def test_acknowledged_writes_and_snapshots_survive_kills_under_load(count, options):
    seed = int(os.environ.get("STILLBLOCK_TEST_SEED", "1"))
    rounds(count, seed, *options)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", [(), ("--cache", "writethrough"), ("--direct",)])
def test_they_survive_hundreds_of_kills(options):
    seed = int(os.environ.get("STILLBLOCK_TEST_SEED", str(time.time_ns() % 10**6)))
    print(f"STILLBLOCK_TEST_SEED={seed}")
    rounds(150, seed, *options)


def changed_blocks(served: Served, since: str) -> set[int]:
    with served.session() as session:
        extents = session.changes(since=since).extents
    return {block for start, end in extents for block in range(start // BLOCK, end // BLOCK)}


@pytest.mark.timeout(180)
def test_what_bookmarks_track_is_exact_after_every_kill():
    """Nothing acknowledged is missed, and nothing counts that nobody asked to be written (P5)."""
    dice = random.Random(int(os.environ.get("STILLBLOCK_TEST_SEED", "2")))
    disk = bytearray(pattern(9, DISK_BYTES))
    bookmarks: dict[str, tuple[set[int], set[int]]] = {}

    def check() -> None:
        for name, (asked, written) in bookmarks.items():
            changed = changed_blocks(served, name)
            assert sorted(written - changed) == [], f"missed since {name}"
            assert sorted(changed - asked) == [], f"not written since {name}"

    with volume(bytes(disk)) as served:
        for number in range(6):
            served.start()
            check()
            if number % 2 == 0:
                name = f"b{number}"
                with served.session() as session:
                    session.create_snapshot(SnapshotRequest(name=name))
                    session.create_bookmark(name)
                    session.delete_snapshot(name)
                bookmarks[name] = (set(), set())
            writers = killed_while_writing(served, disk, dice)
            for asked, written in bookmarks.values():
                asked.update(*(writer.asked_blocks for writer in writers))
                written.update(*(writer.written_blocks for writer in writers))
            served.start()
            live = served.read()
            for writer in writers:
                writer.settle(live)
            same(live, disk, "the live disk")
            check()
            if number % 3 == 2:
                assert served.stop().code == 0
            else:
                served.kill()


@pytest.mark.timeout(120)
def test_a_kill_while_snapshots_are_taken_leaves_each_whole_or_not_there():
    dice = random.Random(3)
    content = pattern(3, 4 * MIB)
    with volume(content) as served:
        for number in range(6):
            served.start()
            acknowledged: list[str] = []
            enough = threading.Event()

            def take(
                number: int = number,
                acknowledged: list[str] = acknowledged,
                enough: threading.Event = enough,
            ) -> None:
                try:
                    with served.session() as session:
                        for count in range(1000):
                            name = f"r{number}.{count}"
                            session.create_snapshot(SnapshotRequest(name=name))
                            acknowledged.append(name)
                            if count >= 2:
                                enough.set()
                except StillblockError:
                    pass  # killed, as it should be
                finally:
                    enough.set()

            thread = threading.Thread(target=take)
            thread.start()
            with served.client() as client:
                at = dice.randrange(1000) * BLOCK
                client.pwrite(content[at : at + BLOCK], offset=at)
            enough.wait(WAIT_S)
            served.kill()
            thread.join()
            served.start()
            with served.session() as session:
                names = {info.name for info in session.list_snapshots().snapshots}
                assert set(acknowledged) <= names
                for name in sorted(names)[:3]:
                    assert served.read(name) == content
                for name in names:
                    session.delete_snapshot(name)
                assert session.show_volume().store_bytes == 0
            served.stop()


@pytest.mark.timeout(120)
def test_a_kill_during_a_restore_leaves_a_disk_that_reads_as_restored():
    size = 64 * MIB
    before = pattern(4, size)
    with volume(before) as served:
        served.start()
        served.snapshot("before")
        with served.client() as client:
            client.pwrite(bytes([7]) * size, offset=0)
        with served.session() as session:
            session.start_restore(RestoreRequest(snapshot="before"))
        with served.client() as client:
            client.pwrite(b"n" * BLOCK, offset=size - BLOCK)
        served.kill()
        served.start()
        expected = before[: size - BLOCK] + b"n" * BLOCK
        same(served.read(), expected, "the live disk while the restore goes on")
        with served.session() as session:
            assert not session.wait_restore(timeout_ms=60_000).is_running
            (safety,) = [i.name for i in session.list_snapshots().snapshots if i.name != "before"]
        same(served.read(), expected, "the live disk after the restore")
        same(served.read("before"), before, "before")
        same(served.read(safety), bytes([7]) * size, "the safety snapshot")
        served.stop()
        same(served.origin.read_bytes(), expected, "the origin")


@pytest.fixture
def killed():
    """A volume whose server was killed with acknowledged writes in its buffer."""
    with volume(pattern(5, 4 * MIB)) as served:
        served.start()
        served.snapshot("before")
        with served.client() as client:
            client.pwrite(b"\xaa" * (64 * BLOCK), offset=0)
            served.kill()
        yield served


def touch(served: Served) -> None:
    """Write to the origin as somebody might who found it lying there, an hour later."""
    with served.origin.open("r+b") as origin:
        origin.seek(2 * MIB)
        origin.write(b"\xbb" * BLOCK)
    later = time.time_ns() + HOUR_NS
    os.utime(served.origin, ns=(later, later))


def test_a_plain_restart_after_a_kill_just_goes_on(killed):
    killed.start()
    assert killed.read()[: 64 * BLOCK] == b"\xaa" * (64 * BLOCK)
    assert killed.read("before") == pattern(5, 4 * MIB)


@pytest.mark.parametrize("how", ["serve", "snapshot"])
def test_an_origin_touched_after_a_kill_is_not_written_over_without_asking(killed, how):
    touch(killed)
    origin = killed.origin.read_bytes()
    words = ["serve", "web"] if how == "serve" else ["snapshot", "create", "web@now"]
    ran = killed.try_cli(*words)
    assert ran.code == 1
    assert "volume recover" in ran.err
    assert "--replay" in ran.err
    assert "--discard" in ran.err
    assert str(killed.origin) in ran.err
    assert killed.origin.read_bytes() == origin


def test_replay_puts_the_acknowledged_writes_over_what_was_touched(killed):
    touch(killed)
    ran = killed.cli("volume", "recover", "web", "--replay", "--yes")
    assert "complete" in ran.out
    origin = killed.origin.read_bytes()
    assert origin[: 64 * BLOCK] == b"\xaa" * (64 * BLOCK)
    assert origin[2 * MIB : 2 * MIB + BLOCK] == b"\xbb" * BLOCK
    killed.start()
    assert killed.read() == origin
    assert "SUSPECT" in killed.cli("snapshot", "list", "web").out


def test_discard_forgets_the_acknowledged_writes_and_keeps_what_was_touched(killed):
    before = pattern(5, 4 * MIB)
    touch(killed)
    killed.cli("volume", "recover", "web", "--discard", "--yes")
    origin = killed.origin.read_bytes()
    assert origin[2 * MIB : 2 * MIB + BLOCK] == b"\xbb" * BLOCK
    for at in range(0, 64 * BLOCK, BLOCK):
        # What the committer had brought home before the kill is on the origin, the rest is gone.
        assert origin[at : at + BLOCK] in (b"\xaa" * BLOCK, before[at : at + BLOCK])
    assert origin[64 * BLOCK : 2 * MIB] == before[64 * BLOCK : 2 * MIB]
    killed.start()
    assert killed.read() == origin
    assert "SUSPECT" in killed.cli("snapshot", "list", "web").out
    assert killed.read("before")[: 64 * BLOCK] == before[: 64 * BLOCK]


def test_a_write_buffer_that_is_gone_is_said_and_only_discard_accepts_it(killed):
    uuid, _, _, _ = native.peek(killed.store)
    buffers = list(Path("/dev/shm").glob(f"stillblock-{uuid}*.buffer"))
    assert len(buffers) == 1
    buffers[0].unlink()
    ran = killed.try_cli("serve", "web")
    assert ran.code == 1
    assert "volume recover" in ran.err
    assert killed.try_cli("volume", "recover", "web", "--replay").code != 0
    assert killed.try_cli("volume", "recover", "web", "--discard").code == 2  # it asks
    killed.cli("volume", "recover", "web", "--discard", "--yes")
    killed.start()
    assert killed.read("before") == pattern(5, 4 * MIB)


def test_an_origin_written_while_nobody_served_it_makes_its_snapshots_suspect():
    with volume(pattern(6, MIB)) as served:
        served.start()
        served.snapshot("before")
        served.stop()
        touch(served)
        served.start()
        assert "SUSPECT" in served.cli("snapshot", "list", "web").out
        assert "SUSPECT" in served.cli("snapshot", "show", "web@before").out
        assert "SUSPECT" in served.cli("volume", "show", "web").out
        served.snapshot("after")
        (after,) = [
            line for line in served.cli("snapshot", "list").out.splitlines() if "@after" in line
        ]
        assert "SUSPECT" not in after


def test_a_clean_stop_under_load_leaves_every_acknowledged_write_on_the_origin():
    disk = bytearray(pattern(7, DISK_BYTES))
    with volume(bytes(disk)) as served:
        served.start()
        served.snapshot("before")
        writer = Writer(disk=disk, start=0, end=DISK_BYTES, dice=random.Random(7))
        thread = threading.Thread(target=writer.run, args=(served.client(),))
        thread.start()
        writer.wait_for(100)
        assert served.stop().code == 0
        thread.join()
        assert writer.error is None
        origin = served.origin.read_bytes()
        writer.settle(origin)
        same(origin, disk, "the origin")
        served.start()
        same(served.read("before"), pattern(7, DISK_BYTES), "before")


def test_two_processes_cannot_open_one_volume_by_any_name():
    with volume(pattern(8, MIB)) as served:
        served.start()
        other = Served(folder=served.folder / "other", origin=served.origin, name="twin")
        other.folder.mkdir()
        ran = other.try_cli("volume", "import", str(served.store), "--name", "twin")
        assert ran.code == 11
        assert "in use" in ran.err or "open in another process" in ran.err
        beside = served.origin.parent
        (beside / "alias.img").symlink_to(served.origin)
        (beside / "hard.img").hardlink_to(served.origin)
        stranger = Served(folder=served.folder / "stranger", origin=served.origin)
        stranger.folder.mkdir()
        for name in ("disk.img", "alias.img", "hard.img"):
            origin = str(beside / name)
            ran = stranger.try_cli("volume", "add", "copy", "--origin", origin)
            assert ran.code == 11, ran.err
            assert "in use by another process" in ran.err
        assert served.read() == pattern(8, MIB)
