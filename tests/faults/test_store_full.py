"""The store runs full under a live disk: the disk goes on, the snapshot says what it lost."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import wait_until
from serving import MIB, Served, pattern, run, try_run, volume
from stillblock.demo.nbd_client import NbdError

pytestmark = pytest.mark.slow

PIECE = 64 << 10
DISK_BYTES = 16 * MIB
WRITTEN = 12 * MIB


@pytest.fixture
def small_store(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 6 MiB."""
    if os.geteuid() != 0:
        pytest.skip("host: mounting a small filesystem needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    ran = try_run("mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder))
    if ran.code != 0:
        pytest.skip(f"host: mount is not allowed here: {ran.err.strip()}")
    yield folder / "store"
    run("umount", str(folder))


def readable(served: Served, snapshot: str, expected: bytes) -> int:
    """Return how many pieces can be read; each of them is right."""
    count = 0
    with served.client(snapshot) as client:
        for at in range(0, len(expected), PIECE):
            try:
                piece = client.pread(offset=at, length=PIECE)
            except NbdError:
                continue
            assert piece == expected[at : at + PIECE], f"other bytes at {at}"
            count += 1
    return count


def test_a_full_store_costs_the_snapshot_and_never_the_disk(small_store):
    before = pattern(50, DISK_BYTES)
    live = b"\x07" * WRITTEN + before[WRITTEN:]
    with tempfile.TemporaryDirectory(prefix="sb-") as folder:
        origin = Path(folder) / "disk.img"
        origin.write_bytes(before)
        served = Served(folder=Path(folder), origin=origin)
        served.cli("volume", "add", "web", "--origin", str(origin), "--store", str(small_store))
        served.start()
        try:
            served.snapshot("a")
            with served.client() as client:
                for at in range(0, WRITTEN, PIECE):
                    client.pwrite(b"\x07" * PIECE, offset=at)
                client.flush()
            assert served.read() == live
            assert "PARTIAL, LOST" in served.cli("snapshot", "list", "web").out
            shown = served.cli("snapshot", "show", "web@a", "--json").json["snapshot"]
            assert shown["is_partial"]
            assert sum(end - start for start, end in shown["lost"]) == shown["lost_bytes"] > 0
            kept = readable(served, "a", before)
            # At least what was never written, and some of what was.
            assert (DISK_BYTES - WRITTEN) // PIECE < kept < DISK_BYTES // PIECE
            ran = served.try_cli("snapshot", "create", "web@b")
            assert ran.code != 0
            assert "full" in ran.err

            served.kill()
            served.start()
            assert served.read() == live
            assert readable(served, "a", before) == kept
            served.cli("snapshot", "delete", "web@a", "--yes")
            served.snapshot("c")
            assert served.read("c") == live
        finally:
            if served.process is not None:
                assert served.stop().code == 0
        assert origin.read_bytes() == live


def write_pieces(served: Served, *, byte: int = 7) -> tuple[int, str]:
    """Overwrite the disk piece by piece until a write fails; return how many were done, and why."""
    with served.client() as client:
        for done, at in enumerate(range(0, DISK_BYTES, PIECE)):
            try:
                client.pwrite(bytes([byte]) * PIECE, offset=at)
            except NbdError as error:
                return done, str(error)
    return DISK_BYTES // PIECE, ""


def wait_for(served: Served, wanted: str) -> None:
    """Wait until an event was written down."""
    assert wait_until(lambda: wanted in served.cli("events", "web").out, 30), f"no event {wanted}"


def test_with_fail_a_client_is_told_that_no_space_is_left():
    before = pattern(51, DISK_BYTES)
    with volume(before, "--store-policy", "fail", "--store-limit", "6M") as served:
        served.start()
        served.snapshot("a")
        done, why = write_pieces(served)
        assert f"error {errno.ENOSPC}" in why
        assert 10 < done < DISK_BYTES // PIECE
        assert served.read("a") == before
        live = served.read()
        # As on any disk, a write that failed may be there in parts.
        assert live[: done * PIECE] == b"\x07" * (done * PIECE)
        assert live[(done + 1) * PIECE :] == before[(done + 1) * PIECE :]
        ran = served.try_cli("status")
        assert (ran.code, "first changes fail" in ran.err) == (3, True)
        status = served.try_cli("status", "--json").json["volumes"][0]["store"]
        assert (status["level"], status["on_full"]) == ("full", "fail")
        wait_for(served, "store_full")
        checked = served.try_cli("volume", "check", "web")
        assert (checked.code, "full" in checked.out + checked.err) == (3, True)
        served.cli("volume", "set", "web", "--store-limit", "64M")
        assert write_pieces(served, byte=8) == (DISK_BYTES // PIECE, "")
        assert served.read("a") == before
        assert served.cli("status").code == 0
        assert served.cli("volume", "check", "web").code == 0
        assert served.stop().code == 0


def test_with_hold_clients_wait_for_room_and_all_else_goes_on():
    before = pattern(52, DISK_BYTES)
    with volume(before, "--store-policy", "hold", "--store-limit", "6M") as served:
        served.start()
        served.snapshot("a")
        held = [threading.Thread(target=write_pieces, args=(served,)) for _ in range(3)]
        for thread in held:
            thread.start()
        with served.session() as session:
            while session.store_usage().held_writes < 3:
                assert all(thread.is_alive() for thread in held)
        with served.client() as client:
            client.pwrite(b"\x08" * 4096, offset=0)
            client.flush()
            assert client.pread(offset=0, length=4096) == b"\x08" * 4096
        assert served.read("a") == before
        served.cli("snapshot", "delete", "web@a", "--yes")
        for thread in held:
            thread.join()
        assert served.read() == b"\x07" * DISK_BYTES or served.read()[4096:] == (
            b"\x07" * (DISK_BYTES - 4096)
        )
        served.snapshot("b")
        writer = threading.Thread(target=write_pieces, args=(served,))
        writer.start()
        with served.session() as session:
            while session.store_usage().held_writes == 0:
                assert writer.is_alive()
        assert served.stop().code == 0, "held writes do not keep a server from stopping"
        writer.join()
