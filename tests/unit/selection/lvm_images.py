"""Physical volumes made by hand, byte by byte, and by LVM2's own tools."""

import os
import re
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

MIB = 1 << 20
PV_ID = "abcdefghijklmnopqrstuvwxyz012345"
OTHER_ID = "otherotherotherotherotherother00"


def checksum(data: bytes) -> int:
    """CRC-32 bit by bit, LVM2's start value: not the code under test's shortcut through zlib."""
    crc = 0xF597A6CF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc


def hyphened(identity: str) -> str:
    cuts = (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(identity[a:b] for a, b in pairwise(cuts))


def segment(start: int, count: int, pv: str, pe: int) -> str:
    return (
        f"segment{start + 1} {{ start_extent = {start} extent_count = {count} "
        f'type = "striped" stripe_count = 1 stripes = [ "{pv}", {pe} ] }}'
    )


def volume(name: str, *segments: str, status: str = '"READ", "WRITE", "VISIBLE"') -> str:
    return (
        f'{name} {{ id = "x" status = [{status}] flags = [] '
        f"segment_count = {len(segments)} {' '.join(segments)} }}"
    )


def group_text(
    *volumes: str, seqno: int = 3, ids: tuple[str, ...] = (PV_ID,), more: str = ""
) -> str:
    """A group `vg0` with extents of 64 KiB; its physical volumes `pv0`… have 100 from 1 MiB on."""
    described = " ".join(
        f'pv{index} {{ id = "{hyphened(identity)}" device = "/dev/x" # hint\n'
        f' status = ["ALLOCATABLE"] pe_start = 2048 pe_count = 100 }}'
        for index, identity in enumerate(ids)
    )
    return (
        f'vg0 {{ id = "group" seqno = {seqno} status = ["RESIZEABLE"] extent_size = 128 '
        f"physical_volumes {{ {described} }} logical_volumes {{ {' '.join(volumes)} }} {more} }}\n"
        'contents = "Text Format Volume Group" version = 1 description = "a \\"b\\" # c"\n'
    )


def physical_volume(
    text: str | None, *, identity: str = PV_ID, size: int = 8 * MIB, at: int = 512
) -> bytearray:
    """A physical volume whose metadata begins `at` bytes into its area, and wraps round its end."""
    content = bytearray(size)
    area, length = 4096, 64 * 1024
    header = identity.encode() + struct.pack("<Q", size) + struct.pack("<QQQQ", MIB, 0, 0, 0)
    header += struct.pack("<QQQQ", area, length, 0, 0) if text is not None else bytes(16)
    body = (struct.pack("<I8s", 32, b"LVM2 001") + header).ljust(492, b"\0")
    content[512:1024] = struct.pack("<8sQI", b"LABELONE", 1, checksum(body)) + body
    if text is None:
        return content
    data = text.encode() + b"\0"
    for index, byte in enumerate(data):
        content[area + 512 + (at - 512 + index) % (length - 512)] = byte
    rest = struct.pack("<16sIQQ", b" LVM2 x[5A%r0N*>", 1, area, length)
    rest += struct.pack("<QQII", at, len(data), checksum(data), 0)
    rest = rest.ljust(508, b"\0")
    content[area : area + 512] = struct.pack("<I", checksum(rest)) + rest
    return content


@contextmanager
def loop_device(path: Path) -> Iterator[str]:
    """Attach a loop device; skip where the host has none."""
    attached = subprocess.run(
        ["losetup", "-f", "--show", path], capture_output=True, text=True, check=False
    )
    if attached.returncode != 0:
        pytest.skip(f"host: no loop devices: {attached.stderr.strip()}")
    device = attached.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def lvm2_volume(path: Path, described: str) -> None:
    """Let LVM2 make a group on an image of 64 MiB and write `described` as its logical volumes.

    Its tools need no device-mapper for that: the text is restored, nothing is activated.
    """
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    with loop_device(path) as device:
        config = path.parent / "lvm"
        config.mkdir(exist_ok=True)
        (config / "lvm.conf").write_text(
            f'devices {{ filter=["a|^{device}$|","r|.*|"] use_devicesfile=0 '
            'obtain_device_list_from_udev=0 external_device_info_source="none" }\n'
            "activation { udev_sync=0 udev_rules=0 }\n"
        )

        def lvm(*arguments: str) -> None:
            subprocess.run(
                ["lvm", *arguments],
                env=os.environ | {"LVM_SYSTEM_DIR": str(config), "LVM_SUPPRESS_FD_WARNINGS": "1"},
                check=True,
                capture_output=True,
            )

        backup = str(path.parent / "group.txt")
        lvm("pvcreate", "-ff", "-y", device)
        lvm("vgcreate", "-s", "1M", "vg0", device)
        lvm("vgcfgbackup", "-f", backup, "vg0")
        text = Path(backup).read_text()
        # Behind the physical volumes, at the end of the group.
        text = re.sub(r"\n}\s*\Z", f"\nlogical_volumes {{\n{described}\n}}\n}}\n", text)
        Path(backup).write_text(text)
        lvm("vgcfgrestore", "-f", backup, "vg0")


def reseal_text(content: bytearray) -> None:
    """Make the checksums right again after a test changed the text in place."""
    area = 4096
    offset, size = struct.unpack_from("<QQ", content, area + 40)
    data = bytes(content[area + offset : area + offset + size])
    struct.pack_into("<I", content, area + 56, checksum(data))
    struct.pack_into("<I", content, area, checksum(bytes(content[area + 4 : area + 512])))
