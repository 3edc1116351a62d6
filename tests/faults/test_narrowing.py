"""kill -9 at each step of a narrowing, and what is left of what rules leave out."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from disks import MARKER, SECRET, ext4_disk, secret_blocks
from serving import volume
from stillblock import native
from stillblock.config import Config
from stillblock.demo.nbd_client import NbdClient
from stillblock.model import RuleTerm
from stillblock.operations import volumes
from stillblock.operations.snapshots import SnapshotRequest
from stillblock.operations.volume import EngineOptions, OpenVolume
from stillblock.service.session import LocalSession, open_session

pytestmark = pytest.mark.needs("mkfs.ext4", "debugfs")

TERMS = tuple(
    RuleTerm(include=False, text=text) for text in ("free", "path:/var/cache/**", "path:/**/*.tmp")
)

CHILD = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[4])
from test_narrowing import TERMS, opened_at, rewrite
from stillblock import native
from stillblock.operations import narrowing
from stillblock.operations.snapshots import SnapshotRequest
from stillblock.service.session import LocalSession

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

step = sys.argv[3]
volume = opened_at(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
real, narrow = narrowing.explain_frozen, native.Volume.narrow
if step == "instant":
    volume.narrowings.start = die
elif step == "resolving":
    narrowing.explain_frozen = die
else:
    def rewriting(*arguments, **keywords):
        rewrite(volume)
        return real(*arguments, **keywords)
    narrowing.explain_frozen = rewriting
    if step == "resolved":
        native.Volume.narrow = die
    else:
        native.Volume.narrow = lambda *a, **k: (narrow(*a, **k), die())
LocalSession(volume).create_snapshot(SnapshotRequest(name="a", terms=TERMS))
"""


def opened_at(state: Path, memory: Path) -> OpenVolume:
    options = EngineOptions(buffer_dir=memory)
    return OpenVolume.open(Config.load(state_dir=state, environment={}, uid=0), "web", options)


def rewrite(volume: OpenVolume) -> None:
    """Write every block that holds the secret again, with the secret in it."""
    content = volume.engine.pread(offset=0, length=volume.engine.size_bytes)
    for at in secret_blocks(content):
        volume.engine.pwrite(MARKER[:4092] + b"anew", offset=at)
    # Beside a block that is kept: a piece of it waits in the buffer.
    volume.engine.pwrite(content[1 << 20 : (1 << 20) + 512], offset=1 << 20)


def holders(*folders: Path) -> list[str]:
    """Return the files below that hold the secret."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if SECRET in path.read_bytes()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    disk, _ = ext4_disk(tmp_path_factory.mktemp("disk"))
    return disk


@pytest.fixture
def scene(made, tmp_path):
    """(state, memory, origin) of a volume `web`."""
    origin, state, memory = tmp_path / "disk.img", tmp_path / "s", tmp_path / "memory"
    shutil.copy(made, origin)
    memory.mkdir()
    config = Config.load(state_dir=state, environment={}, uid=0)
    config.ensure()
    request = volumes.AddRequest(name="web", origin=origin, store=tmp_path / "store")
    volumes.add_volume(config, volumes.plan_add(config, request))
    return state, memory, origin


def test_what_rules_leave_out_is_nowhere_in_store_or_buffer_once_narrowed(scene, monkeypatch):
    """Written before the instant and after it, preserved, and held in slots: all of it goes."""
    from stillblock.operations import narrowing

    state, memory, _ = scene
    with opened_at(state, memory) as volume:
        # An older snapshot that selects everything makes slots and copies of what is left out.
        volume.engine.snapshot(selection=((0, 1 << 20),), meta=b"", pause_limit_ms=2000)
        rewrite(volume)
        real, seen = narrowing.explain_frozen, []

        def rewriting(*arguments, **keywords):
            rewrite(volume)
            volume.engine.flush()
            rewrite(volume)
            seen.extend(holders(memory, Path(volume.engine.store)))
            return real(*arguments, **keywords)

        monkeypatch.setattr(narrowing, "explain_frozen", rewriting)
        session = LocalSession(volume)
        receipt = session.create_snapshot(SnapshotRequest(name="a", terms=TERMS))
        assert len(seen) >= 2, "in the log and in the buffer, or this test proves nothing"
        assert {term.unresolved for term in receipt.terms} == {()}
        assert holders(memory, Path(volume.engine.store)) == []
        rewrite(volume)
        volume.engine.flush()
        assert holders(memory, Path(volume.engine.store)) == [], "P4: left out is not tracked"


@pytest.mark.parametrize("step", ["instant", "resolving", "resolved", "narrowed"])
def test_a_narrowing_that_was_killed_is_done_by_the_next_opening(scene, tmp_path, step):
    state, memory, origin = scene
    before = origin.read_bytes()
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(here.parent)])}
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, str(state), str(memory), step, str(here)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    config = Config.load(state_dir=state, environment={}, uid=0)
    with open_session(config, "web", EngineOptions(buffer_dir=memory)) as session:
        session.wait_final(session.receipt("a"))
        receipt = session.receipt("a")
        assert receipt.is_intact
        assert {term.unresolved for term in receipt.terms} == {()}
        again = session.create_snapshot(SnapshotRequest(name="b", terms=TERMS))
        assert receipt.extents == again.extents
        assert receipt.left_out == again.left_out
        assert holders(memory, tmp_path / "store") == []
    engine = native.Volume.open(tmp_path / "store", buffer_dir=memory)
    view = engine.view(epoch=receipt.snapshot.epoch)
    for start, end in receipt.extents:
        assert view.pread(offset=start, length=end - start) == before[start:end]
    view.close()
    engine.close()


def test_rules_that_change_under_load_leave_the_open_snapshot_alone(made):
    """Byte for byte and receipt for receipt; the next instant uses the new rules."""
    secret = secret_blocks(made.read_bytes())
    stop = threading.Event()
    written = threading.Event()

    def write(client: NbdClient) -> None:
        dice = random.Random(5)
        with client:
            while not stop.is_set():
                client.pwrite(dice.randbytes(4096), offset=dice.choice(secret))
                written.set()

    with volume(made.read_bytes()) as served:
        served.cli("rules", "set", "web", "--exclude", "free")
        served.start()
        served.snapshot("first")
        told = served.cli("snapshot", "receipt", "web@first", "--json").json
        content = served.read("first")
        writer = threading.Thread(target=write, args=(served.client(),))
        writer.start()
        try:
            assert written.wait(30)
            served.cli("rules", "set", "web", "--exclude", "path:/var/cache/**")
            served.snapshot("second")
            second = served.cli("snapshot", "receipt", "web@second", "--json").json
        finally:
            stop.set()
            writer.join()
        assert {part["because"] for part in second["left_out"]} == {"path:/var/cache/**"}
        assert served.read("first") == content
        again = served.cli("snapshot", "receipt", "web@first", "--json").json
        for document in (told, again):
            # How much it has preserved by now is all that may differ.
            del document["snapshot"]["preserved_bytes"], document["snapshot"]["exclusive_bytes"]
        assert again == told
