"""Partition tables that sfdisk made: we must see the partitions that sfdisk itself sees."""

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillblock.selection import PartitionTable, Rules, read_partitions, resolve
from stillblock.selection.partition_types import KNOWN_TYPES

pytestmark = pytest.mark.needs("sfdisk")

MIB = 1 << 20


@dataclass(frozen=True)
class FileDisk:
    path: Path
    size: int

    def pread(self, *, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


def sfdisk(*arguments: str, script: str = "") -> str:
    done = subprocess.run(
        ["sfdisk", *arguments], input=script, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def image(path: Path, script: str, *, size: int = 64 * MIB) -> FileDisk:
    with path.open("wb") as file:
        file.truncate(size)
    sfdisk("--quiet", str(path), script=script)
    return FileDisk(path, size)


def read(disk: FileDisk) -> PartitionTable:
    table = read_partitions(disk)
    assert table is not None
    return table


def assert_same_as_sfdisk(table: PartitionTable, device: str) -> None:
    told = json.loads(sfdisk("--json", device))["partitiontable"]
    assert {"gpt": "gpt", "mbr": "dos"}[table.kind] == told["label"]
    assert table.sector_size == told["sectorsize"]
    assert table.disk_id == told["id"].lower().removeprefix("0x")
    expected = []
    for partition in told["partitions"]:
        start, count = partition["start"], partition["size"]
        kind = partition["type"].lower()
        expected.append(
            (
                int(re.fullmatch(rf"{re.escape(device)}p?([0-9]+)", partition["node"])[1]),
                start * table.sector_size,
                (start + count) * table.sector_size,
                kind if table.kind == "gpt" else f"0x{int(kind, 16):02x}",
                partition.get("name", ""),
                partition.get("uuid", "").lower(),
            )
        )
    assert [
        (p.number, p.start, p.end, p.type, p.name, p.uuid if table.kind == "gpt" else "")
        for p in table.partitions
    ] == expected


GPT_SCRIPT = """label: gpt
size=8MiB, type=uefi, name="EFI System"
size=1MiB, type=21686148-6449-6E6F-744E-656564454649
size=16MiB, type=swap, name="Auslagerung ä", attrs="RequiredPartition,LegacyBIOSBootable"
size=513, type=linux
type=linux, name="rest"
"""


def test_a_gpt_of_sfdisk_is_read_as_sfdisk_reads_it(tmp_path: Path) -> None:
    disk = image(tmp_path / "gpt.img", GPT_SCRIPT)
    table = read(disk)
    assert_same_as_sfdisk(table, str(disk.path))
    assert table.notes == ()
    assert table.partitions[2].flags == ("required", "legacy-boot")


def test_a_gpt_with_gaps_in_its_numbers_is_read_as_sfdisk_reads_it(tmp_path: Path) -> None:
    disk = image(tmp_path / "gpt.img", GPT_SCRIPT)
    sfdisk("--quiet", "--delete", str(disk.path), "2", "4")
    table = read(disk)
    assert [p.number for p in table.partitions] == [1, 3, 5]
    assert_same_as_sfdisk(table, str(disk.path))


def test_the_backup_gpt_of_sfdisk_says_what_its_primary_says(tmp_path: Path) -> None:
    disk = image(tmp_path / "gpt.img", GPT_SCRIPT)
    whole = read(disk)
    with disk.path.open("r+b") as file:
        file.seek(512)
        file.write(bytes(512))
    from_backup = read(disk)
    assert from_backup.partitions == whole.partitions
    assert "primary GPT is damaged" in from_backup.notes[0]


@contextlib.contextmanager
def loop_device(path: Path, *, sector_size: int) -> Iterator[str]:
    attached = subprocess.run(
        ["losetup", "--sector-size", str(sector_size), "--find", "--show", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if attached.returncode != 0:
        pytest.skip(f"host: no loop device with {sector_size}-byte sectors")
    device = attached.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.needs("losetup")
@pytest.mark.parametrize(
    "script",
    [
        "label: gpt\nsize=8MiB, name=one\nsize=4097, name=two\nname=three\n",
        "label: dos\nsize=8MiB\nsize=32MiB, type=extended\nsize=4MiB\nsize=4MiB, type=swap\n",
    ],
    ids=["gpt", "mbr with logical partitions"],
)
def test_a_table_with_4096_byte_sectors_is_read_as_sfdisk_reads_it(
    tmp_path: Path, script: str
) -> None:
    path = tmp_path / "4k.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    with loop_device(path, sector_size=4096) as device:
        # The kernel need not know the partitions, and may be unable to.
        sfdisk("--quiet", "--no-reread", "--no-tell-kernel", device, script=script)
        subprocess.run(["sync", device], check=True)
        table = read(FileDisk(path, 64 * MIB))
        assert_same_as_sfdisk(table, device)
    assert table.sector_size == 4096


MBR_SCRIPT = """label: dos
label-id: 0x90a1b2c3
size=8MiB, type=83, bootable
size=513, type=7
size=1MiB, type=ef
"""

LOGICAL_SCRIPT = """label: dos
label-id: 0x90a1b2c3
size=8MiB, type=83
size=40MiB, type=5
size=4MiB, type=82
size=777, type=8e
size=5MiB, type=83
size=1MiB, type=c
"""


@pytest.mark.parametrize("script", [MBR_SCRIPT, LOGICAL_SCRIPT], ids=["primary", "logical"])
def test_an_mbr_of_sfdisk_is_read_as_sfdisk_reads_it(tmp_path: Path, script: str) -> None:
    disk = image(tmp_path / "mbr.img", script)
    assert_same_as_sfdisk(read(disk), str(disk.path))


def test_forty_logical_partitions_are_read_as_sfdisk_reads_them(tmp_path: Path) -> None:
    script = "label: dos\ntype=f\n" + "size=64\n" * 40
    disk = image(tmp_path / "mbr.img", script, size=128 * MIB)
    table = read(disk)
    assert len(table.partitions) == 41
    assert_same_as_sfdisk(table, str(disk.path))


def test_a_chain_with_a_deleted_logical_partition_is_read_as_sfdisk_reads_it(
    tmp_path: Path,
) -> None:
    disk = image(tmp_path / "mbr.img", LOGICAL_SCRIPT)
    for number in ("6", "5"):
        sfdisk("--quiet", "--delete", str(disk.path), number)
        assert_same_as_sfdisk(read(disk), str(disk.path))


def test_a_hybrid_mbr_is_read_as_sfdisk_reads_it(tmp_path: Path) -> None:
    """sfdisk takes the GPT of a hybrid too; the MBR's second slot is set by hand."""
    disk = image(tmp_path / "gpt.img", GPT_SCRIPT)
    with disk.path.open("r+b") as file:
        file.seek(446 + 16 + 4)
        file.write(b"\x83" + bytes(3) + (2048).to_bytes(4, "little") + (100).to_bytes(4, "little"))
    table = read(disk)
    assert "hybrid" in table.notes[-1]
    assert_same_as_sfdisk(table, str(disk.path))


@pytest.mark.needs("mkfs.vfat")
@pytest.mark.parametrize("fat_bits", ["12", "16", "32"])
def test_a_fat_filesystem_on_the_whole_disk_has_no_table(tmp_path: Path, fat_bits: str) -> None:
    path = tmp_path / "fat.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.vfat", "-I", "-F", fat_bits, str(path)], check=True, capture_output=True)
    assert read_partitions(FileDisk(path, 64 * MIB)) is None


@pytest.mark.needs("mkfs.ntfs")
def test_an_ntfs_filesystem_on_the_whole_disk_has_no_table(tmp_path: Path) -> None:
    path = tmp_path / "ntfs.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ntfs", "-F", "-f", "-q", str(path)], check=True, capture_output=True)
    assert read_partitions(FileDisk(path, 64 * MIB)) is None


def test_leaving_out_swap_keeps_every_other_byte_of_an_sfdisk_image(tmp_path: Path) -> None:
    disk = image(tmp_path / "gpt.img", GPT_SCRIPT)
    rules = Rules.parse([("exclude", "part:type=swap")])
    resolution = resolve(rules, disk, block_size=4096)
    swap = json.loads(sfdisk("--json", str(disk.path)))["partitiontable"]["partitions"][2]
    start, end = swap["start"] * 512, (swap["start"] + swap["size"]) * 512
    assert resolution.extents == ((0, start), (end, disk.size))


def test_every_known_type_is_known_to_sfdisk() -> None:
    """A mistyped GUID would make a name match nothing. sfdisk has no LUKS and no MBR code E8."""
    guids = sfdisk("--list-types", "--label", "gpt").lower()
    codes = {line.split()[0] for line in sfdisk("--list-types", "--label", "dos").splitlines()[2:]}
    for name, known in KNOWN_TYPES.items():
        if name == "luks":
            continue
        for guid in known.guids:
            assert guid in guids, name
        for code in known.mbr_codes:
            assert f"{code:x}" in codes, name
