"""The catalog against the stores: killed at any statement, lost, from yesterday, rotten."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stillblock.config import Config
from stillblock.errors import CatalogError, NotFoundError, StillblockError
from stillblock.operations import imports, volumes
from stillblock.operations.registry import open_catalog
from stillblock.operations.snapshots import SnapshotRequest, create_snapshot
from stillblock.operations.volume import OpenVolume

pytestmark = pytest.mark.slow

MIB = 1 << 20
STATEMENTS_MAX = 100
KILLED = 9

SERVER = """
import json, os, sys
from pathlib import Path
from stillblock.catalog import Catalog
from stillblock.config import Config
from stillblock.operations import imports, volumes
from stillblock.operations.snapshots import SnapshotRequest, create_snapshot
from stillblock.operations.volume import OpenVolume

execute = Catalog._execute

def work(what, state, origin, store, at):
    config = Config.load(state_dir=Path(state))
    statement = 0

    def counted(self, *words):
        nonlocal statement
        statement += 1
        if statement == at:
            os._exit(9)  # as a kill: nothing is undone, nothing is flushed
        return execute(self, *words)

    Catalog._execute = counted
    if what == "add":
        request = volumes.AddRequest(name="web", origin=Path(origin), store=Path(store))
        volumes.add_volume(config, volumes.plan_add(config, request))
    elif what == "remove":
        volumes.remove_volume(config, volumes.plan_remove(config, "web"))
    elif what == "import":
        request = imports.ImportRequest(store=Path(store), origin=Path(origin))
        imports.import_volume(config, imports.plan_import(config, request))
    elif what == "snapshot":
        with OpenVolume.open(config, "web") as volume:
            create_snapshot(volume, SnapshotRequest(name="new"))

for line in sys.stdin:
    child = os.fork()  # this process has one thread; importing anew each time would take minutes
    if child == 0:
        work(*json.loads(line))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def killed() -> Iterator[Callable[[str, Place, int], bool]]:
    """Do something in a process that is killed before a statement; return whether it got there."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def at(what: str, place: Place, statement: int) -> bool:
        words = [what, str(place.state), str(place.origin), str(place.store), statement]
        print(json.dumps(words), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        assert code in {0, KILLED}
        return code == KILLED

    yield at
    server.communicate(timeout=30)


class Place:
    """A state directory, a disk, and a store that lies elsewhere."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.state, self.origin, self.store = folder / "s", folder / "disk.img", folder / "store"
        self.origin.write_bytes(b"content!" * (MIB // 8))
        self.config = Config.load(state_dir=self.state)
        self.config.ensure()

    def add(self, store: Path | None = None) -> None:
        request = volumes.AddRequest(name="web", origin=self.origin, store=store or self.store)
        volumes.add_volume(self.config, volumes.plan_add(self.config, request))

    def take(self, name: str) -> None:
        with OpenVolume.open(self.config, "web") as volume:
            create_snapshot(volume, SnapshotRequest(name=name))

    def names(self) -> list[str]:
        return [v.name for v in volumes.list_volumes(self.config, lambda _: False)]

    def snapshots(self) -> list[str]:
        with OpenVolume.open(self.config, "web") as volume:
            return [s.record.name for s in volume.snapshots()]


def every_statement(tmp_path: Path):
    """Fresh places, until the operation ends before its statement comes."""
    for statement in range(1, STATEMENTS_MAX):
        yield statement, Place(tmp_path / str(statement))
    pytest.fail(f"more than {STATEMENTS_MAX} statements")


def test_a_volume_is_added_or_not_whenever_it_is_killed(tmp_path, killed):
    outcomes = set()
    for statement, place in every_statement(tmp_path):
        was_killed = killed("add", place, statement)
        is_there = place.names() == ["web"]
        assert place.store.exists() == is_there, f"an orphan at statement {statement}"
        outcomes.add(is_there)
        if not is_there:
            place.add()
        place.take("monday")
        if not was_killed:
            assert is_there
            break
    assert outcomes == {True, False}


def test_a_volume_is_removed_or_not_whenever_it_is_killed(tmp_path, killed):
    outcomes = set()
    for statement, place in every_statement(tmp_path):
        place.add()
        place.take("monday")
        before = place.origin.read_bytes()
        was_killed = killed("remove", place, statement)
        is_there = place.names() == ["web"]
        assert place.store.exists() == is_there, f"half a store at statement {statement}"
        if is_there:
            assert place.snapshots() == ["monday"]
        else:
            place.add()
        assert place.origin.read_bytes() == before
        outcomes.add(is_there)
        if not was_killed:
            assert not is_there
            break
    assert outcomes == {True, False}


def test_a_store_is_imported_or_not_whenever_it_is_killed(tmp_path, killed):
    for statement, place in every_statement(tmp_path):
        place.add()
        place.take("monday")
        plan = volumes.plan_remove(place.config, "web", keep_store=True)
        volumes.remove_volume(place.config, plan)
        was_killed = killed("import", place, statement)
        if place.names() != ["web"]:
            assert was_killed
            request = imports.ImportRequest(store=place.store, origin=place.origin)
            imports.import_volume(place.config, imports.plan_import(place.config, request))
        assert place.snapshots() == ["monday"]
        if not was_killed:
            break


def test_a_snapshot_is_taken_or_not_whenever_its_process_is_killed(tmp_path, killed):
    for statement, place in every_statement(tmp_path):
        place.add()
        place.take("monday")
        was_killed = killed("snapshot", place, statement)
        assert place.names() == ["web"]
        names = place.snapshots()
        assert names in (["monday"], ["monday", "new"])
        if not was_killed:
            assert names == ["monday", "new"]
            break


def test_a_lost_catalog_finds_the_stores_in_the_state_directory_again(tmp_path):
    place = Place(tmp_path / "lost")
    place.add(store=place.state / "stores" / "web")
    place.take("monday")
    for path in place.state.glob("catalog.sqlite*"):
        path.unlink()
    assert place.names() == ["web"]
    assert place.snapshots() == ["monday"]
    assert not any(s.is_suspect for s in epochs(place))
    # Once: what is taken off the list stays off.
    volumes.remove_volume(place.config, volumes.plan_remove(place.config, "web", keep_store=True))
    assert place.names() == []


def epochs(place: Place):
    with OpenVolume.open(place.config, "web") as volume:
        return [s.epoch for s in volume.snapshots()]


def test_a_catalog_from_yesterday_leads_to_no_other_store_and_no_other_disk(tmp_path):
    """Since yesterday the volume was removed, and another one got its name and its store's path."""
    place = Place(tmp_path / "yesterday")
    place.add()
    with open_catalog(place.config):
        pass  # its last connection writes everything into the one file
    yesterday = place.config.catalog_path.read_bytes()
    volumes.remove_volume(place.config, volumes.plan_remove(place.config, "web"))
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    old, place.origin = place.origin, other
    place.add()
    place.take("monday")
    place.config.catalog_path.write_bytes(yesterday)
    with pytest.raises(CatalogError, match="another volume"):
        place.snapshots()
    assert old.read_bytes() == b"content!" * (MIB // 8)
    assert other.read_bytes() == bytes(MIB)
    volumes.remove_volume(place.config, volumes.plan_remove(place.config, "web", keep_store=True))
    plan = imports.plan_import(place.config, imports.ImportRequest(store=place.store))
    assert plan.origin == str(other)
    imports.import_volume(place.config, plan)
    assert place.snapshots() == ["monday"]


def test_an_origin_that_moved_since_the_catalog_was_saved_is_found_by_the_store(tmp_path):
    place = Place(tmp_path / "moved")
    place.add()
    place.take("monday")
    yesterday = place.config.catalog_path.read_bytes()
    volumes.remove_volume(place.config, volumes.plan_remove(place.config, "web", keep_store=True))
    moved = tmp_path / "moved.img"
    shutil.copy2(place.origin, moved)
    place.origin.write_bytes(bytes(MIB))  # another disk has the old path now
    request = imports.ImportRequest(store=place.store, origin=moved)
    imports.import_volume(place.config, imports.plan_import(place.config, request))
    place.config.catalog_path.write_bytes(yesterday)
    with OpenVolume.open(place.config, "web") as volume:
        assert volume.engine.origin == str(moved)
        volume.engine.pwrite(b"x" * 4096, offset=0)
    assert place.origin.read_bytes() == bytes(MIB)


def test_a_flipped_bit_in_the_catalog_is_an_error_or_without_effect(tmp_path):
    place = Place(tmp_path / "rot")
    place.add()
    place.take("monday")
    catalog = place.config.catalog_path
    clean = catalog.read_bytes()
    expected = volumes.list_volumes(place.config, lambda _: False)
    rng = random.Random(7)
    places = [clean.index(str(place.store).encode()), clean.index(b"web")]
    bits = [at * 8 + rng.randrange(8 * 3) for at in places for _ in range(6)]
    bits += [rng.randrange(len(clean) * 8) for _ in range(150)]
    told = 0
    for bit in bits:
        data = bytearray(clean)
        data[bit // 8] ^= 1 << bit % 8
        for path in place.state.glob("catalog.sqlite-*"):
            path.unlink()
        catalog.write_bytes(data)
        try:
            assert volumes.list_volumes(place.config, lambda _: False) == expected
            assert place.snapshots() == ["monday"]
        except NotFoundError:
            pytest.fail(f"bit {bit}: the volume vanished")
        except StillblockError:
            told += 1
    assert told >= 12
