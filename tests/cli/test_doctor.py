"""`stillblock doctor`: what is wrong with the state directory is found, and put right if asked."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from stillblock import native
from stillblock.operations import state as examined
from stillblock.operations.findings import Level


@pytest.fixture
def found(run):
    """What is not well, by name; and the exit code."""

    def look(*words: str) -> tuple[int, dict[str, dict[str, str]]]:
        ran = run("doctor", "--json", *words)
        checks = ran.json["checks"]
        return ran.code, {c["name"]: c for c in checks if c["level"] in {"warning", "broken"}}

    return look


@pytest.fixture(autouse=True)
def _no_buffers_of_others(monkeypatch, tmp_path):
    """Other tests leave write buffers in the machine's memory."""
    memory = tmp_path / "shm"
    memory.mkdir()
    monkeypatch.setattr(examined, "_SHM", memory)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


def test_a_sound_state_directory_has_no_finding(found, web):
    assert found() == (0, {})


def test_a_socket_that_nobody_listens_on_is_told_and_removed(found, web, state):
    path = state / "run" / "gone.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    code, checks = found()
    assert code == 3
    assert str(path) in checks["sockets"]["finding"]
    assert path.exists()  # only told
    assert found("--repair") == (0, {})
    assert not path.exists()


def test_a_store_that_is_not_on_the_list_is_told_and_put_back(found, run, web, state):
    run("snapshot", "create", "web@monday")
    run("volume", "remove", "--keep-store", "web", "--yes")
    code, checks = found()
    assert code == 3
    assert "not on the list" in checks["store"]["finding"]
    assert found("--repair") == (0, {})
    assert "web@monday" in run("snapshot", "list", "web").out


@pytest.mark.parametrize("damage", ["garbage", "a path"])
def test_a_damaged_catalog_is_told_and_rebuilt(found, run, web, state, damage):
    run("snapshot", "create", "web@monday")
    catalog = state / "catalog.sqlite"
    data = catalog.read_bytes()
    rotten = b"x" * 5000 if damage == "garbage" else data.replace(b"stores/web", b"stores/wfb")
    catalog.write_bytes(rotten)
    for path in state.glob("catalog.sqlite-*"):
        path.unlink()
    code, checks = found()
    assert code == 1
    assert "--repair" in checks["catalog"]["advice"]
    assert run("volume", "list").code == 1
    assert found("--repair") == (0, {})
    assert "web@monday" in run("snapshot", "list", "web").out
    assert list(state.glob("catalog.damaged-*"))


def test_a_store_elsewhere_is_found_again_by_what_can_be_read_of_a_damaged_catalog(
    found, run, tmp_path, state
):
    disk, store = tmp_path / "far.img", tmp_path / "far"
    disk.write_bytes(bytes(1 << 20))
    run("volume", "add", "far", "--origin", str(disk), "--store", str(store))
    uuid = native.peek(store)[0].encode()
    catalog = state / "catalog.sqlite"
    data = catalog.read_bytes()
    assert b"far" + uuid in data
    catalog.write_bytes(data.replace(b"far" + uuid, b"far" + uuid[:-1] + b"z"))
    assert run("volume", "list").code == 1
    assert found("--repair") == (0, {})
    (volume,) = run("volume", "list", "--json").json["volumes"]
    assert (volume["name"], volume["store"]) == ("far", str(store))


def test_a_full_filesystem_is_a_problem(found, web, monkeypatch):
    full = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    code, checks = found()
    assert code == 1
    assert checks["volume web: room in the store"]["level"] == Level.BROKEN


def test_a_directory_that_others_may_write_to_is_told_and_closed(found, web, state):
    state.chmod(0o777)
    code, checks = found()
    assert code == 3
    assert "others" in checks["state directory"]["finding"]
    assert found("--repair") == (0, {})
    assert state.stat().st_mode & 0o077 == 0


def test_a_write_buffer_that_nobody_needs_is_told_and_removed(found, web, state, tmp_path):
    uuid, _, _, _ = native.peek(state / "stores" / "web")
    mine = tmp_path / "shm" / f"stillblock-{uuid}.buffer"
    unknown = tmp_path / "shm" / f"stillblock-{'0' * 32}.buffer"
    mine.write_bytes(b"old")
    unknown.write_bytes(b"somebody's")
    assert found()[0] == 3
    assert found("--repair")[0] == 3  # the other one is not ours to delete
    assert not mine.exists()
    assert unknown.exists()


def test_an_origin_and_a_store_that_are_gone_are_told(found, web, state):
    web.rename(web.with_suffix(".away"))
    code, checks = found()
    assert code == 1
    assert "does not exist" in checks["volume web"]["finding"]
    (state / "stores" / "web").rename(Path(str(state) + "-away"))
    assert "journal" in found()[1]["volume web"]["finding"]
