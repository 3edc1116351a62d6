"""What an origin really is, judged on a made-up /sys and /proc."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillblock.errors import (
    ImageNotRawError,
    NotFoundError,
    OriginMountedError,
    OriginTakenError,
    RefusedError,
    StoreOnVolumeError,
)
from stillblock.model import VolumeEntry
from stillblock.operations import origins
from stillblock.operations.origins import System, check_origin, image_format


def padded(head: bytes, size: int = 4096) -> bytes:
    return head + bytes(size - len(head))


VDI = bytes(0x40) + struct.pack("<I", 0xBEDA107F)
FOOTER = bytes(3584) + padded(b"conectix\x00\x00\x00\x02\x00\x01\x00\x00", 512)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (padded(b"QFI\xfb\x00\x00\x00\x03"), "qcow2"),
        (padded(b"QFI\xfb\x00\x00\x00\x01"), "qcow"),
        (padded(b"QED\x00"), "qed"),
        (padded(b"KDMV"), "vmdk"),
        (padded(b"# Disk DescriptorFile\nversion=1"), "vmdk"),
        (padded(b"vhdxfile"), "vhdx"),
        (padded(b"conectix"), "vpc"),
        (FOOTER, "vpc"),
        (padded(VDI), "vdi"),
    ],
)
def test_an_image_that_is_not_raw_is_refused_with_its_conversion(tmp_path, content, name):
    image = tmp_path / "my disk.img"
    image.write_bytes(content)
    with pytest.raises(ImageNotRawError) as caught:
        check_origin(image)
    assert f"is a {name} image" in str(caught.value)
    assert f"qemu-img convert -f {name} -O raw '{image}'" in str(caught.value)


@pytest.mark.parametrize(
    "head", [b"LUKS\xba\xbe\x00\x02", b"\xeb\x58\x90mkfs.fat", b"", b"conectiX"]
)
def test_raw_content_is_taken_for_raw(head):
    assert image_format(padded(head, 512), bytes(512)) is None


def test_an_origin_that_is_missing_empty_or_a_directory_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(NotFoundError, match="does not exist"):
        check_origin(tmp_path / "nowhere")
    with pytest.raises(RefusedError, match="truncate"):
        check_origin(tmp_path / "empty")
    with pytest.raises(RefusedError, match="neither"):
        check_origin(tmp_path)


@dataclass
class Machine:
    """A made-up machine: block devices are files whose keys are looked up here."""

    root: Path
    keys: dict[Path, origins.Key]

    @property
    def system(self) -> System:
        return System(
            sys_dev_block=self.root / "dev_block",
            sys_block=self.root / "block",
            mountinfo=self.root / "mountinfo",
            swaps=self.root / "swaps",
        )

    def device(self, name: str, major: int, minor: int, *, parent: str | None = None) -> Path:
        """Make a block device, or a partition of one."""
        directory = self.root / "block" / (f"{parent}/{name}" if parent else name)
        directory.mkdir(parents=True)
        (directory / "dev").write_text(f"{major}:{minor}\n")
        if parent:
            (directory / "partition").write_text("1\n")
        (self.root / "dev_block").mkdir(exist_ok=True)
        (self.root / "dev_block" / f"{major}:{minor}").symlink_to(directory)
        node = self.root / "dev" / name
        node.parent.mkdir(exist_ok=True)
        node.touch()
        self.keys[node] = ("block", major, minor)
        return node

    def loop(self, number: int, backing: Path) -> Path:
        """Make a loop device on a file."""
        node = self.device(f"loop{number}", 7, number)
        directory = self.root / "block" / f"loop{number}" / "loop"
        directory.mkdir()
        (directory / "backing_file").write_text(f"{backing}\n")
        return node

    def held_by(self, device: str, holder: str) -> None:
        """Put a device-mapper device on another."""
        for kind, on, by in (("holders", device, holder), ("slaves", holder, device)):
            directory = self.root / "block" / on / kind
            directory.mkdir(exist_ok=True)
            (directory / Path(by).name).symlink_to(self.root / "block" / by)

    def mount(self, device: str, source: str, point: str) -> None:
        line = f"36 35 {device} / {point} rw,noatime shared:1 - ext4 {source} rw\n"
        with (self.root / "mountinfo").open("a") as mounts:
            mounts.write(line)

    def swap(self, path: Path) -> None:
        (self.root / "swaps").write_text(f"Filename Type Size Used Priority\n{path} file 1 0 -2\n")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    made = Machine(root=tmp_path, keys={})
    real = origins.key_of

    def key_of(path: Path) -> origins.Key | None:
        return made.keys.get(Path(os.path.realpath(path))) or real(path)

    monkeypatch.setattr(origins, "key_of", key_of)
    return made


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "web.img"
    path.write_bytes(bytes(8192))
    return path


def entry(origin: Path) -> VolumeEntry:
    return VolumeEntry(name="web", uuid="u", origin=str(origin), store="/nowhere")


def is_taken(machine: Machine, new: Path, known: Path) -> bool:
    try:
        origins.refuse_taken(new, [entry(known)], machine.system)
    except OriginTakenError:
        return True
    return False


def test_a_file_is_taken_under_any_of_its_names(machine, image, tmp_path):
    (tmp_path / "symlink").symlink_to(image)
    os.link(image, tmp_path / "hardlink")
    other = tmp_path / "other.img"
    other.write_bytes(bytes(8192))
    assert is_taken(machine, image, image)
    assert is_taken(machine, tmp_path / "symlink", image)
    assert is_taken(machine, tmp_path / "hardlink", image)
    assert not is_taken(machine, other, image)


def test_a_loop_device_and_its_file_are_one_disk(machine, image):
    loop0, loop1 = machine.loop(0, image), machine.loop(1, image)
    assert is_taken(machine, loop0, image)
    assert is_taken(machine, image, loop0)
    assert is_taken(machine, loop1, loop0)


def test_a_disk_clashes_with_its_partitions_and_they_do_not_with_each_other(machine):
    disk = machine.device("sda", 8, 0)
    first = machine.device("sda1", 8, 1, parent="sda")
    second = machine.device("sda2", 8, 2, parent="sda")
    assert is_taken(machine, first, disk)
    assert is_taken(machine, disk, second)
    assert not is_taken(machine, first, second)


def test_a_device_mapper_volume_clashes_with_the_disk_below_it(machine):
    disk = machine.device("sdb", 8, 16)
    mapped = machine.device("dm-0", 253, 0)
    machine.held_by("sdb", "dm-0")
    assert is_taken(machine, mapped, disk)
    assert is_taken(machine, disk, mapped)


def test_a_mounted_disk_is_refused_with_its_mount_point(machine):
    disk = machine.device("sda", 8, 0)
    machine.device("sda1", 8, 1, parent="sda")
    machine.mount("8:1", "/dev/sda1", "/srv/my\\040data")
    with pytest.raises(OriginMountedError, match="mounted at /srv/my data"):
        origins.refuse_mounted(disk, machine.system)


def test_a_file_that_backs_a_mounted_loop_device_is_refused(machine, image):
    machine.loop(0, image)
    machine.mount("7:0", "/dev/loop0", "/mnt")
    with pytest.raises(OriginMountedError, match="/mnt"):
        origins.refuse_mounted(image, machine.system)


def test_a_mount_with_a_device_number_of_its_own_is_found_by_its_source(machine):
    disk = machine.device("sdc", 8, 32)
    machine.mount("0:45", str(disk), "/btrfs")
    with pytest.raises(OriginMountedError, match="/btrfs"):
        origins.refuse_mounted(disk, machine.system)


def test_an_image_that_a_server_shows_is_refused_and_a_device_on_it(machine, image):
    device = image.stat().st_dev
    loop = machine.loop(0, image)
    machine.mount(f"{os.major(device)}:{os.minor(device)}", "stillblock:web", "/home/you/still")
    for disk in (image, loop):
        with pytest.raises(RefusedError, match="an image that a server shows"):
            origins.refuse_image(disk, machine.system)


def test_a_store_on_a_mounted_image_is_refused(machine, image, tmp_path):
    loop = machine.loop(0, image)
    device = image.stat().st_dev
    machine.mount("0:45", str(loop), str(tmp_path.resolve()))
    origins.refuse_on_image(tmp_path / "a" / "store", machine.system, what="store")
    machine.mount(f"{os.major(device)}:{os.minor(device)}", "stillblock:web", "/home/you/still")
    with pytest.raises(StoreOnVolumeError, match="that a server shows"):
        origins.refuse_on_image(tmp_path / "a" / "store", machine.system, what="store")


def test_swap_is_refused(machine, image):
    machine.swap(image)
    with pytest.raises(OriginMountedError, match="swapoff"):
        origins.refuse_mounted(image, machine.system)


def test_an_idle_disk_is_not_refused(machine, image):
    machine.mount("8:99", "/dev/elsewhere", "/")
    origins.refuse_mounted(image, machine.system)
    origins.refuse_image(image, machine.system)
    origins.refuse_on_volume(image.parent / "new", image, machine.system, what="store")


def test_a_store_on_the_volume_itself_is_refused(machine, image, tmp_path):
    loop = machine.loop(0, image)
    machine.mount("0:45", str(loop), str(tmp_path.resolve()))
    with pytest.raises(StoreOnVolumeError, match=r"store .* lies on"):
        origins.refuse_on_volume(tmp_path / "a" / "store", image, machine.system, what="store")
