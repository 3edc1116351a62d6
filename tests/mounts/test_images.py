"""Disks as files: what they hold, how they come and go, what can be written."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from disks import partitioned
from processes import wait_until
from serving import BLOCK, MIB, Served, pattern, run, volume_of


def shown(served: Served, place: Path) -> Path:
    """The images of a volume, in a directory below `place`."""
    directory = place / "still"
    directory.mkdir(exist_ok=True)
    served.cli("mount", "--images", served.name, str(directory))
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_files_are_what_clients_read_and_come_and_go_with_what_they_show(served, place):
    images = shown(served, place)
    assert names(images) == ["disk.raw"]
    served.snapshot("monday", "--exclude", "1MiB-2MiB")
    monday = (images / "@monday.raw").read_bytes()
    assert (
        monday
        == served.read("monday")
        == pattern(1, MIB * 4)[:MIB] + bytes(MIB) + monday[2 * MIB :]
    )
    with served.client() as client:
        client.pwrite(b"changed", offset=3 * MIB)
    assert (images / "disk.raw").read_bytes() == served.read()
    assert (images / "@monday.raw").read_bytes() == monday
    served.cli("snapshot", "rename", "web@monday", "old")
    assert names(images) == ["@old.raw", "disk.raw"]
    # The kernel keeps what it read of a snapshot; another of the same name must not be read so.
    served.snapshot("monday", "--only-these", "--include", "all")
    assert (images / "@monday.raw").read_bytes() == served.read()
    served.cli("snapshot", "delete", "web@monday", "--yes")
    assert names(images) == ["@old.raw", "disk.raw"]
    listed = served.cli("mount", "--json").json["mounts"]
    assert [(one["reference"], one["where"]) for one in listed] == [("web", str(images))]
    served.cli("unmount", str(images))
    assert names(images) == []
    assert served.cli("mount", "--json").json["mounts"] == []


def test_a_clone_is_written_by_its_file_and_by_clients_and_both_see_it(served, place):
    served.snapshot("monday", "--only-these", "--include", "all")
    served.cli("clone", "create", "web@monday+x")
    images = shown(served, place)
    before = served.read(), served.read("monday")
    wanted = bytearray(before[1])
    path = images / "@monday+x.raw"
    with path.open("r+b", buffering=0) as file, served.client("monday+x") as client:
        for offset, length in ((10, 5), (BLOCK, BLOCK), (MIB - 100, 300_000), (4 * MIB - 7, 7)):
            data = pattern(offset, length)
            assert file.seek(offset) == offset
            assert file.write(data) == length
            wanted[offset : offset + length] = data
            assert client.pread(offset=offset, length=length) == data
        os.fsync(file.fileno())
        client.pwrite(b"from a client", offset=2 * MIB + 5)
        wanted[2 * MIB + 5 : 2 * MIB + 18] = b"from a client"
        assert os.pread(file.fileno(), 13, 2 * MIB + 5) == b"from a client"
        run("fallocate", "--punch-hole", "--offset", "3145000", "--length", "9000", str(path))
        wanted[3145000:3154000] = bytes(9000)
        run("fallocate", "--zero-range", "--offset", "512", "--length", "5000", str(path))
        wanted[512:5512] = bytes(5000)
    assert path.read_bytes() == wanted
    assert (served.read(), served.read("monday")) == before
    served.kill()
    served.start()
    assert served.read("monday+x") == wanted


def test_what_cannot_be_written_refuses_and_a_disk_keeps_its_size(served, place):
    served.snapshot("monday")
    served.cli("clone", "create", "web@monday+x")
    images = shown(served, place)
    for name in ("disk.raw", "@monday.raw"):
        with pytest.raises(OSError, match="Read-only") as refused:
            os.open(images / name, os.O_RDWR)
        assert refused.value.errno == errno.EROFS
    clone = images / "@monday+x.raw"
    with pytest.raises(PermissionError):
        os.truncate(clone, 100)
    descriptor = os.open(clone, os.O_RDWR)
    try:
        with pytest.raises(OSError, match="No space"):
            os.pwrite(descriptor, b"x", 4 * MIB)
        assert os.pwrite(descriptor, b"xy", 4 * MIB - 1) == 1
    finally:
        os.close(descriptor)
    for change in (
        lambda: (images / "new").touch(),
        lambda: clone.unlink(),
        lambda: clone.rename(images / "y"),
    ):
        with pytest.raises(OSError, match=r"implemented|permitted|denied"):
            change()
    assert names(images) == ["@monday+x.raw", "@monday.raw", "disk.raw"]


def test_holes_are_told_so_that_a_copy_is_sparse_and_the_same(served, place, tmp_path):
    served.snapshot("monday", "--only-these", "--include", "0-1MiB", "--include", "2MiB-2052KiB")
    images = shown(served, place)
    descriptor = os.open(images / "@monday.raw", os.O_RDONLY)
    try:
        assert os.lseek(descriptor, 0, os.SEEK_HOLE) == MIB
        assert os.lseek(descriptor, MIB, os.SEEK_DATA) == 2 * MIB
        assert os.lseek(descriptor, 2 * MIB, os.SEEK_HOLE) == 2 * MIB + BLOCK
        with pytest.raises(OSError, match="No such device") as none:
            os.lseek(descriptor, 3 * MIB, os.SEEK_DATA)
        assert none.value.errno == errno.ENXIO
    finally:
        os.close(descriptor)
    copied = tmp_path / "copy"
    run("cp", str(images / "@monday.raw"), str(copied))
    assert copied.read_bytes() == served.read("monday")
    assert copied.stat().st_blocks * 512 <= MIB + 64 * 1024


def test_content_that_is_damaged_is_an_error_and_its_neighbours_are_not(served, place):
    served.snapshot("monday", "--only-these", "--include", "all")
    original = pattern(1, 4 * MIB)
    with served.client() as client:
        client.pwrite(b"x" * 3 * BLOCK, offset=MIB)
        client.flush()
    images = shown(served, place)
    rotten = original[MIB + BLOCK : MIB + 2 * BLOCK]
    for segment in served.store.rglob("*"):
        content = segment.read_bytes() if segment.is_file() else b""
        if (at := content.find(rotten)) >= 0:
            with segment.open("r+b") as file:
                file.seek(at + 77)
                file.write(bytes([content[at + 77] ^ 1]))
    descriptor = os.open(images / "@monday.raw", os.O_RDONLY | os.O_DIRECT)
    try:
        with pytest.raises(OSError, match="Input/output"):
            _pread_direct(descriptor, BLOCK, MIB + BLOCK)
        assert _pread_direct(descriptor, BLOCK, MIB) == original[MIB : MIB + BLOCK]
        after = _pread_direct(descriptor, BLOCK, MIB + 2 * BLOCK)
        assert after == original[MIB + 2 * BLOCK : MIB + 3 * BLOCK]
    finally:
        os.close(descriptor)


def _pread_direct(descriptor: int, length: int, offset: int) -> bytes:
    with mmap.mmap(-1, length) as buffer:
        assert os.preadv(descriptor, [buffer], offset) == length
        return bytes(buffer)


def test_what_is_open_keeps_its_snapshot_unless_forced_and_then_gives_errors(served, place):
    served.snapshot("monday")
    images = shown(served, place)
    with (images / "@monday.raw").open("rb", buffering=0) as file:
        refused = served.try_cli("snapshot", "delete", "web@monday", "--yes")
        assert refused.code == 1
        assert "is open 1 times" in refused.err
        assert os.pread(file.fileno(), 5, 0) == pattern(1, 4 * MIB)[:5]
        served.cli("snapshot", "delete", "web@monday", "--yes", "--force")
        with pytest.raises(OSError, match="Input/output"):
            os.pread(file.fileno(), 5, 2 * MIB)
    assert names(images) == ["disk.raw"]


def test_partitions_of_a_snapshot_are_files_and_those_of_its_clones_can_be_written(place, tmp_path):
    disk = tmp_path / "disk.img"
    part = pattern(7, 2 * MIB)
    partitioned(disk, part, size=4 * MIB)
    with volume_of(disk, str(place)) as served:
        served.start()
        # The table itself is left out: it is then read from the live disk.
        served.snapshot("monday", "--only-these", "--include", "part:1")
        served.cli("clone", "create", "web@monday+x")
        images = shown(served, place)
        assert names(images) == [
            "@monday+x.parts",
            "@monday+x.raw",
            "@monday.parts",
            "@monday.raw",
            "disk.raw",
        ]
        assert names(images / "@monday.parts") == ["p1.raw"]
        assert (images / "@monday.parts" / "p1.raw").read_bytes() == part
        with (images / "@monday+x.parts" / "p1.raw").open("r+b") as file:
            file.write(b"rehearsed")
        assert served.read("monday+x")[MIB : MIB + 9] == b"rehearsed"
        assert (images / "@monday.parts" / "p1.raw").read_bytes() == part
        served.stop()


@pytest.mark.slow
def test_many_readers_and_writers_of_files_agree_with_clients(served, place):
    """One process a reader or writer, each on a range of its own, while snapshots come and go."""
    served.snapshot("monday", "--only-these", "--include", "all")
    served.cli("clone", "create", "web@monday+x")
    images = shown(served, place)
    script = """
import os, random, sys
path, start, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dice, size = random.Random(seed), 1 << 20
fd = os.open(path, os.O_RDWR)
model = bytearray(os.pread(fd, size, start))
for step in range(300):
    at = dice.randrange(size)
    length = min(size - at, dice.choice([1, 512, 4096, 5000, 100000]))
    if dice.random() < 0.5:
        data = dice.randbytes(length)
        assert os.pwrite(fd, data, start + at) == length
        model[at:at + length] = data
    else:
        assert os.pread(fd, length, start + at) == model[at:at + length], (seed, step)
    if step % 50 == 0:
        os.fsync(fd)
sys.stdout.buffer.write(bytes(model))
"""
    path = str(images / "@monday+x.raw")
    workers = [
        subprocess.Popen(
            ["/usr/bin/python3", "-c", script, path, str(n * MIB), str(n)], stdout=subprocess.PIPE
        )
        for n in range(4)
    ]
    for number in range(3):
        served.snapshot(f"s{number}")
        served.cli("snapshot", "delete", f"web@s{number}", "--yes")
    wanted = b"".join(worker.communicate(timeout=60)[0] for worker in workers)
    assert [worker.returncode for worker in workers] == [0] * 4
    assert served.read("monday+x") == wanted
    assert served.read("monday") == pattern(1, 4 * MIB)


@pytest.mark.needs("fusermount3", "setpriv")
def test_it_needs_no_root(place, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("host: becoming another user needs root")
    user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    place.chmod(0o755)
    home, still = place / "home", place / "still"
    for directory in (home, still):
        directory.mkdir()
        os.chown(directory, 65534, 65534)
    (home / "disk.img").write_bytes(pattern(9, MIB))
    os.chown(home / "disk.img", 65534, 65534)
    if subprocess.run([*user, sys.executable, "-c", "import stillblock"], check=False).returncode:
        pytest.skip("host: another user cannot read this Python")
    environment = os.environ | {"STILLBLOCK_STATE": str(home / "s"), "HOME": str(home)}
    program = [*user, sys.executable, "-m", "stillblock"]

    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program, *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    assert cli("volume", "add", "web", "--origin", str(home / "disk.img")).returncode == 0
    server = subprocess.Popen(
        [*program, "serve", "web", "--json"], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        server.stdout.readline()
        ran = cli("mount", "--images", "web", str(still))
        if "/dev/fuse: Permission" in ran.stderr or "not permitted" in ran.stderr:
            pytest.skip(f"host: FUSE is not allowed to users: {ran.stderr.strip()}")
        assert ran.returncode == 0, ran.stderr
        read = subprocess.run(
            [*user, "cat", str(still / "disk.raw")], capture_output=True, check=True
        )
        assert read.stdout == pattern(9, MIB)
        assert cli("unmount", str(still)).returncode == 0
        assert "needs root" in cli("mount", "web@x", str(still)).stderr
    finally:
        server.terminate()
        server.communicate(timeout=30)
    assert wait_until(lambda: not any(still.iterdir()))
