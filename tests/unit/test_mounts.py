"""What a mount's device consists of, from trees like the kernel's; and what a proof needs."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from stillblock.consistency.mounts import Mount, System, _leaves, prove_on_volume
from stillblock.errors import FreezeRefusedError

MIB = 1 << 20


class Tree:
    """A /sys/dev/block of links into /sys/devices, as the kernel's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.devices = folder / "devices"
        self.links = folder / "block"
        self.links.mkdir()

    @property
    def system(self) -> System:
        return System(sys_dev_block=self.links, dev=self.folder / "dev")

    def add(self, name: str, number: str, *, backing: Path | None = None, of: str = "") -> Path:
        made = self.devices / of / name
        made.mkdir(parents=True)
        (made / "slaves").mkdir()
        if of:
            (made / "partition").write_text("1\n")
        if backing is not None:
            (made / "loop").mkdir()
            (made / "loop" / "backing_file").write_text(f"{backing}\n")
        (self.links / number).symlink_to(made)
        return made

    def mount(self, number: str, source: str = "/dev/x") -> Mount:
        major, _, minor = number.partition(":")
        return Mount(
            fd=-1,
            path=Path("/mnt"),
            kind="ext4",
            device=(int(major), int(minor)),
            source=source,
            is_read_only=False,
        )


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_a_partition_of_a_loop_ends_at_the_file_behind_it(tree, tmp_path):
    tree.add("loop0", "7:0", backing=tmp_path / "disk")
    tree.add("loop0p1", "259:0", of="loop0")
    assert _leaves(tree.mount("259:0"), tree.system) == [tmp_path / "disk"]


def test_a_logical_volume_ends_at_every_disk_of_its_group(tree, tmp_path):
    nbd = tree.add("nbd0", "43:0")
    loop = tree.add("loop0", "7:0", backing=tmp_path / "disk")
    lv = tree.add("dm-0", "252:0")
    for device in (nbd, loop):
        (lv / "slaves" / device.name).symlink_to(device)
    found = _leaves(tree.mount("252:0"), tree.system)
    assert sorted(found) == sorted([tree.folder / "dev" / "nbd0", tmp_path / "disk"])


def test_a_name_with_a_slash_is_a_path_below_dev(tree):
    tree.add("cciss!c0d0", "104:0")
    assert _leaves(tree.mount("104:0"), tree.system) == [tree.folder / "dev" / "cciss" / "c0d0"]


def test_what_has_no_block_device_has_no_leaves_and_is_refused(tree):
    mount = tree.mount("0:42", source="tmpfs")
    assert _leaves(mount, tree.system) == []
    with pytest.raises(FreezeRefusedError, match="no block device"):
        prove_on_volume(mount, Volume([]), volume_name="web", system=tree.system)


class Volume:
    """A volume that sees what a test says: a file's reads are not really its own."""

    def __init__(self, seen: list[int]) -> None:
        self.seen, self.lengths = seen, []

    def watch_reads(self, *, length: int) -> None:
        self.lengths.append(length)

    def reads_seen(self) -> list[int]:
        return self.seen


class Following(Volume):
    """One that sees the probes, moved by `base`, and whatever else is read meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base: int, *, missing: int = 0) -> None:
        super().__init__([random.Random(3).randrange(MIB) for _ in range(5)])
        self.base, self.missing = base, missing
        read = os.preadv

        def preadv(fd, buffers, offset, *more):
            if self.missing:
                self.missing -= 1
            else:
                self.seen.append(offset + self.base)
            return read(fd, buffers, offset, *more)

        monkeypatch.setattr(os, "preadv", preadv)


@pytest.fixture
def disk(tree):
    """On the disk that holds the sources: memory filesystems may have no direct I/O."""
    file = tree.folder / "disk"
    file.write_bytes(bytes(MIB))
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("host: no direct I/O here")
    tree.add("loop0", "7:0", backing=file)
    return tree.mount("7:0")


@pytest.mark.parametrize("base", [0, 1 << 20, 3 << 30])
def test_reads_that_all_arrive_by_the_same_distance_are_proof(tree, disk, monkeypatch, base):
    volume = Following(monkeypatch, base)
    prove_on_volume(disk, volume, volume_name="web", system=tree.system)
    assert volume.lengths[-1] == 0, "nobody looks any more"


def test_reads_of_which_some_never_arrive_are_no_proof(tree, disk, monkeypatch):
    volume = Following(monkeypatch, 0, missing=1)
    # The first of each try is kept by a cache.
    original = volume.watch_reads

    def watch(*, length: int) -> None:
        original(length=length)
        volume.seen.clear()
        volume.missing = 1

    volume.watch_reads = watch
    with pytest.raises(FreezeRefusedError, match="not known to sit on volume web"):
        prove_on_volume(disk, volume, volume_name="web", system=tree.system)


def test_other_peoples_reads_are_no_proof(tree, disk):
    volume = Volume([4096 * number for number in range(0, 256, 7)][:5])
    with pytest.raises(FreezeRefusedError, match="do not arrive there"):
        prove_on_volume(disk, volume, volume_name="web", system=tree.system)


def test_a_group_of_which_one_disk_is_another_volumes_is_refused(tree, disk, monkeypatch):
    other = tree.folder / "other"
    other.write_bytes(bytes(4096))  # too small to be probed
    loops = [tree.devices / "loop0", tree.add("loop1", "7:1", backing=other)]
    lv = tree.add("dm-0", "252:0")
    for device in loops:
        (lv / "slaves" / device.name).symlink_to(device)
    volume = Following(monkeypatch, 0)
    with pytest.raises(FreezeRefusedError, match="other do not arrive"):
        prove_on_volume(tree.mount("252:0"), volume, volume_name="web", system=tree.system)


def test_a_mount_of_an_image_is_refused_before_anything_is_read(tree, tmp_path):
    """Whoever answers reads of an image is who would ask: killed meanwhile, it would never end."""
    still = tmp_path / "still"
    tree.add("loop0", "7:0", backing=still / "@monday+x.raw")
    table = tmp_path / "mountinfo"
    table.write_text(
        f"40 27 0:39 / {tmp_path} rw - ext4 /dev/x rw\n"
        f"42 40 0:40 / {still} rw,nosuid - fuse.stillblock stillblock:web rw\n"
    )
    system = replace(tree.system, mountinfo=table)
    with pytest.raises(FreezeRefusedError, match="a mount of an image"):
        prove_on_volume(tree.mount("7:0"), Unread(), volume_name="web", system=system)


class Unread:
    """A volume whose reads nobody may watch."""

    def watch_reads(self, *, length: int) -> None:
        raise AssertionError(length)

    def reads_seen(self) -> list[int]:
        raise AssertionError
