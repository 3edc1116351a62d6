"""Clones as other people's clients use them: libnbd, QEMU, and a kernel that mounts one."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mounted import formatted, mounted
from serving import BLOCK, MIB, Served, run, volume

SIZE = 4 * MIB

OPERATIONS = """
import nbd, random, sys
uri, seed = sys.argv[1], int(sys.argv[2])
dice = random.Random(seed)
first, second = nbd.NBD(), nbd.NBD()
for handle in (first, second):
    handle.connect_uri(uri)
assert first.can_multi_conn() and first.can_fua() and first.can_zero() and first.can_trim()
assert not first.is_read_only()
size = first.get_size()
model = bytearray(first.pread(size, 0))
for step in range(400):
    handle, other = (first, second) if dice.random() < 0.5 else (second, first)
    offset = dice.randrange(size)
    length = min(size - offset, dice.choice([1, 100, 512, 4096, 5000, 65536, 300000]))
    if dice.random() < 0.4:
        offset -= offset % 4096
        length = min(size - offset, max(4096, length - length % 4096))
    kind = dice.random()
    if kind < 0.5:
        data = dice.randbytes(length)
        handle.pwrite(data, offset, nbd.CMD_FLAG_FUA if dice.random() < 0.1 else 0)
        model[offset:offset + length] = data
    elif kind < 0.65:
        handle.zero(length, offset, nbd.CMD_FLAG_NO_HOLE if dice.random() < 0.5 else 0)
        model[offset:offset + length] = bytes(length)
    elif kind < 0.75:
        handle.trim(length, offset)
        model[offset:offset + length] = handle.pread(length, offset)
    elif kind < 0.85:
        handle.flush()
    # A write that was answered to one connection is there for the other.
    assert other.pread(length, offset) == model[offset:offset + length], (step, offset, length)
assert first.pread(size, 0) == model
import hashlib
print(hashlib.sha256(model).hexdigest())
"""


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cloned() -> Iterator[Served]:
    """A disk with holes and data, its snapshot without the second MiB, and a clone of that."""
    content = bytearray(random.Random(5).randbytes(SIZE))
    content[2 * MIB : 3 * MIB] = bytes(MIB)
    with volume(bytes(content)) as made:
        made.start()
        made.snapshot("monday", "--exclude", "1MiB-2MiB")
        made.cli("clone", "create", "web@monday+x")
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_any_operation_of_libnbd_on_two_connections_agrees_with_a_byte_array(
    cloned: Served, nbdsh: Callable[..., list[str]], seed: int
):
    before = (cloned.read(), cloned.read("monday"))
    (told,) = nbdsh(OPERATIONS, cloned.uri("monday+x"), str(seed))
    assert digest(cloned.read("monday+x")) == told
    assert (cloned.read(), cloned.read("monday")) == before
    cloned.kill()
    cloned.start()
    assert digest(cloned.read("monday+x")) == told
    cloned.stop()
    cloned.start()
    assert digest(cloned.read("monday+x")) == told


@pytest.mark.needs("qemu-img", "qemu-io")
def test_block_status_of_a_clone_leads_qemu_to_what_it_holds(cloned: Served, tmp_path: Path):
    copied = tmp_path / "copied.qcow2"
    uri = cloned.uri("monday+x")
    write = f"write -P 0x5a {MIB + 3 * BLOCK} 10k"
    run("qemu-io", "-f", "raw", "-c", write, "-c", "write -z -u 3M 64k", "-c", "flush", uri)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, str(copied))
    run("qemu-img", "compare", uri, str(copied))
    run("qemu-img", "check", str(copied))


@pytest.mark.needs("nbdinfo")
def test_what_was_written_counts_as_held_though_the_snapshot_left_it_out(cloned: Served):
    with cloned.client("monday+x") as client:
        client.pwrite(b"x" * 100, offset=MIB + 8192)
    told = run("nbdinfo", "--map=x-stillblock:selected", "--json", cloned.uri("monday+x"))
    found = [(e["offset"], e["length"], e["type"]) for e in told.json]
    assert found == [
        (0, MIB, 1),
        (MIB, 8192, 0),
        (MIB + 8192, BLOCK, 1),
        (MIB + 12288, MIB - 12288, 0),
        (2 * MIB, 2 * MIB, 1),
    ]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.needs("mkfs.ext4", "fsck.ext4", "nbdfuse", "losetup", "mount")
def test_a_clone_is_mounted_changed_and_checked_while_the_live_disk_is_in_use():
    """The live filesystem is written throughout; the snapshot stays what it was, bit for bit."""
    with formatted("ext4") as served:
        served.start()
        with mounted(served) as live:
            for number in range(20):
                live.write(f"file-{number}", bytes([number]) * 20_000)
            served.cli("snapshot", "create", "web@monday", "--only-these", "--include", "all")
            served.cli("clone", "create", "web@monday+rehearsal")
            monday = digest(served.read("monday"))
            is_over = threading.Event()

            def load() -> None:
                number = 0
                while not is_over.is_set():
                    live.write(f"load-{number % 8}", random.Random(number).randbytes(50_000))
                    number += 1

            thread = threading.Thread(target=load)
            thread.start()
            try:
                with mounted(served, snapshot="monday+rehearsal", is_writable=True) as rehearsal:
                    assert (rehearsal.point / "file-7").read_bytes() == bytes([7]) * 20_000
                    for number in range(0, 20, 2):
                        (rehearsal.point / f"file-{number}").unlink()
                    for number in range(5):
                        rehearsal.write(f"new-{number}", bytes([99 + number]) * 200_000)
                    there = {path.name for path in rehearsal.point.glob("[fn]*-*")}
            finally:
                is_over.set()
                thread.join()
            assert digest(served.read("monday")) == monday
            assert {path.name for path in live.point.glob("file-*")} == {
                f"file-{number}" for number in range(20)
            }
            assert not list(live.point.glob("new-*"))
        image = served.folder / "promoted.img"
        served.cli("clone", "promote", "web@monday+rehearsal", "--to", str(image))
        run("fsck.ext4", "-f", "-n", str(image))
        wanted = {f"file-{n}" for n in range(1, 20, 2)} | {f"new-{n}" for n in range(5)}
        assert there == wanted
        assert image.read_bytes() == served.read("monday+rehearsal")
        with mounted(served, "noload", snapshot="monday+rehearsal") as again:
            assert (again.point / "new-3").read_bytes() == bytes([102]) * 200_000
        assert digest(served.read("monday")) == monday
