"""Block devices as origins, direct I/O, and disks whose length is a multiple of nothing."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving import BLOCK, MIB, Served, pattern, run, try_run, volume, volume_of

pytestmark = [pytest.mark.needs("qemu-io"), pytest.mark.slow]

BUILD = Path(__file__).resolve().parents[2] / "target"
"""On the disk that holds the sources, whatever /tmp is."""


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`loop(size, sector=512)`: a loop device over random bytes; its backing file is `.image`."""
    attached: list[str] = []

    def attach(size: int, *options: str) -> Path:
        image = tmp_path / f"image{len(attached)}"
        image.write_bytes(pattern(40, size))
        ran = try_run("losetup", "--find", "--show", *options, str(image))
        if ran.code != 0:
            pytest.skip(f"host: no loop devices: {ran.err.strip()}")
        attached.append(ran.out.strip())
        return Path(attached[-1])

    if os.geteuid() != 0:
        pytest.skip("host: loop devices need root")
    yield attach
    for device in attached:
        run("losetup", "--detach", device)


@pytest.fixture(scope="session")
def real_disk() -> Iterator[Path]:
    """A directory where direct I/O goes to a device."""
    parent = BUILD if BUILD.is_dir() else BUILD.parent
    with tempfile.TemporaryDirectory(prefix="direct-", dir=parent) as made:
        kind = run("stat", "--file-system", "--format=%T", made).out.strip()
        if kind in {"tmpfs", "ramfs", "overlayfs"}:
            pytest.skip(f"host: the sources lie on {kind}, which has no direct I/O to test")
        yield Path(made)


def exercise(served: Served, before: bytes, *, seed: int) -> bytes:
    """Write at random, some of it zeros, by two clients of two kinds; return what must be there."""
    dice, live = random.Random(seed), bytearray(before)
    with served.client() as client:
        for _ in range(60):
            size = dice.choice([1, 511, 512, 1000, BLOCK, 5000, 70_000, 300_000, 1 << 20])
            offset = dice.randrange(len(before) - 1)
            alignment = dice.choice([1, 512, BLOCK])
            offset = offset // alignment * alignment
            size = min(size, len(before) - offset)
            data = dice.randbytes(size)
            client.pwrite(data, offset=offset)
            live[offset : offset + size] = data
            assert client.pread(offset=offset, length=size) == data
        client.flush()
    # qemu-io counts in sectors: the last bytes of an odd disk are not its business.
    for flags in ("-z", "-z -u"):
        start = dice.randrange(len(before) // 2) // 512 * 512
        run("qemu-io", "-f", "raw", "-c", f"write {flags} {start} 200k", served.uri())
        end = min(start + (200 << 10), len(live))
        live[start:end] = bytes(end - start)
    assert served.read() == live
    return bytes(live)


def whole_story(served: Served, *options: str) -> None:
    """Serve, snapshot, write, read back, restart, restore, release."""
    before = served.origin.read_bytes()
    served.start(*options)
    served.snapshot("monday")
    live = exercise(served, before, seed=1)
    assert served.read("monday") == before
    served.snapshot("tuesday", "--include", "0-1MiB")
    exercise(served, live, seed=2)
    tuesday = live[:MIB] + bytes(len(live) - MIB)
    assert served.read("tuesday") == tuesday
    served.kill()
    served.start(*options)
    assert served.read("monday") == before
    assert served.read("tuesday") == tuesday
    served.cli("restore", "run", "web@monday", "--yes")
    assert served.read() == before
    assert "complete" in served.cli("volume", "release", "web").out
    assert served.process is not None
    assert served.process.wait(timeout=30) == 0
    served.process.communicate()
    served.process = None
    assert served.origin.read_bytes() == before


@pytest.mark.parametrize(
    ("size", "sector", "options"),
    [
        (4 * MIB, (), ()),
        (4 * MIB + 512, (), ()),
        (3 * MIB + 1536, (), ("--direct",)),
        (4 * MIB, ("--sector-size", "4096"), ("--direct",)),
    ],
)
def test_a_block_device_is_served_snapshotted_and_restored(loop, tmp_path, size, sector, options):
    device = loop(size, *sector)
    with tempfile.TemporaryDirectory(prefix="sb-") as folder, volume_of(device, folder) as served:
        whole_story(served, *options)


@pytest.mark.parametrize(
    ("tail", "block_size"),
    [(0, "4096"), (512, "4096"), (3, "4096"), (4095, "4096"), (1536, "64KiB"), (4095, "64KiB")],
)
def test_direct_io_serves_disks_of_any_length(real_disk, tail, block_size):
    content = pattern(41, 3 * MIB + tail)
    with volume(content, "--block-size", block_size, parent=real_disk) as served:
        whole_story(served, "--direct")
        assert served.origin.stat().st_size == len(content)


@pytest.mark.parametrize("size", [1, 511, 4095, 4097])
@pytest.mark.parametrize("options", [(), ("--direct",)])
def test_the_smallest_disks_are_disks_too(real_disk, size, options):
    content = pattern(42, size)
    with volume(content, parent=real_disk) as served:
        served.start(*options)
        served.snapshot("s")
        with served.client() as client:
            client.pwrite(b"\xee" * size, offset=0)
            client.flush()
            assert client.pread(offset=0, length=size) == b"\xee" * size
        assert served.read("s") == content
        assert served.stop().code == 0
        assert served.origin.read_bytes() == b"\xee" * size


def test_a_disk_behind_a_loop_device_is_no_second_volume(loop, tmp_path):
    device = loop(MIB)
    with tempfile.TemporaryDirectory(prefix="sb-") as folder, volume_of(device, folder) as served:
        ran = served.try_cli("volume", "add", "again", "--origin", str(tmp_path / "image0"))
        assert ran.code != 0
        assert "web" in ran.err


@pytest.mark.needs("mkfs.ext4")
def test_a_mounted_device_is_refused(loop, tmp_path):
    device = loop(8 * MIB)
    run("mkfs.ext4", "-q", "-F", str(device))
    folder = tmp_path / "mnt"
    folder.mkdir()
    ran = subprocess.run(["mount", str(device), str(folder)], capture_output=True, check=False)
    if ran.returncode != 0:
        pytest.skip(f"host: mount is not allowed here: {ran.stderr.decode().strip()}")
    try:
        made = Served(folder=tmp_path, origin=device)
        ran = made.try_cli("volume", "add", "web", "--origin", str(device))
        assert ran.code != 0
        assert "mounted" in ran.err
        assert str(folder) in ran.err
    finally:
        run("umount", str(folder))


def test_growing_a_file_that_is_served_is_taken_over_and_tracked(real_disk):
    before = pattern(43, MIB + 700)
    with volume(before, parent=real_disk) as served:
        served.start()
        served.snapshot("small")
        with served.client() as client:
            client.pwrite(b"\x01" * 700, offset=MIB)
        with served.origin.open("ab") as origin:
            origin.write(b"\x02" * 10_000)
        served.cli("volume", "resize", "web")
        live = before[:MIB] + b"\x01" * 700 + b"\x02" * 10_000
        assert served.read() == live
        assert served.read("small") == before
        diff = served.cli("snapshot", "diff", "web@small", "--json").json
        (last,) = diff["extents"][-1:]
        assert last[0] <= MIB
        assert last[1] == len(live)
        served.snapshot("large")
        with served.client() as client:
            client.pwrite(b"\x03" * 10_000, offset=MIB + 700)
        assert served.read("large") == live
        served.stop()
        assert served.origin.read_bytes() == live[: MIB + 700] + b"\x03" * 10_000


def test_shrinking_under_snapshots_is_refused_with_the_length_to_restore(real_disk):
    with volume(pattern(44, 2 * MIB), parent=real_disk) as served:
        served.start()
        served.snapshot("s")
        served.stop()
        os.truncate(served.origin, MIB)
        ran = served.try_cli("serve", "web")
        assert ran.code != 0
        assert str(2 * MIB) in ran.err
        assert "restore its length" in ran.err
