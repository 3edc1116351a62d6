"""One disk with a filesystem of every family, each with the same tree, made by their own tools."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving import MIB, run, try_run

TOOLS = ("mkfs.ext4", "mkfs.xfs", "mkfs.ntfs", "mkfs.vfat", "mkfs.btrfs", "ntfs-3g", "mcopy")
TOOLS = (*TOOLS, "sfdisk", "losetup", "mount", "nbdcopy")
SECRET = b"left out of snapshots "


@dataclass(frozen=True)
class Kind:
    """A family, its partition's number and size, and what its files can have."""

    name: str
    number: int
    size: int
    has_modes: bool = True
    has_links: bool = True
    has_holes: bool = True


KINDS = (
    Kind("ext4", 1, 32 * MIB),
    Kind("xfs", 2, 320 * MIB),
    Kind("btrfs", 3, 128 * MIB),
    Kind("ntfs", 4, 32 * MIB, has_modes=False),
    Kind("vfat", 5, 40 * MIB, has_modes=False, has_links=False, has_holes=False),
)
START = MIB


def start_of(kind: Kind) -> int:
    """Where on the disk its partition begins."""
    return START + sum(other.size for other in KINDS if other.number < kind.number)


DISK_BYTES = START + sum(kind.size for kind in KINDS) + MIB


def grow(root: Path, kind: Kind, *, seed: int = 1) -> None:
    """Fill a filesystem with what a tree can have there."""
    dice = random.Random(seed)
    for folder in ("etc", "srv/data", "var/cache", "empty"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(60):
        (root / f"srv/data/file {number}").write_bytes(dice.randbytes(dice.randint(0, 40_000)))
    (root / "etc/tiny").write_bytes(b"tiny\n")
    (root / "etc/nothing").write_bytes(b"")
    (root / "srv/large").write_bytes(dice.randbytes(3 * MIB + 17))
    for number in range(4):
        (root / f"var/cache/c{number}").write_bytes(SECRET * dice.randint(400, 4000))
    if kind.has_holes:
        with (root / "srv/sparse").open("wb") as file:
            for at in (0, 300_000, 2 * MIB):
                file.seek(at)
                file.write(dice.randbytes(5000))
            file.truncate(5 * MIB)
    if kind.has_links:
        (root / "etc/link").symlink_to("tiny")
        (root / "absolute").symlink_to("/etc/tiny")
        (root / "folder").symlink_to("etc")
        (root / "etc/dangling").symlink_to("nowhere/at/all")
        os.link(root / "etc/tiny", root / "second name")
    if kind.has_modes:
        (root / "etc/tiny").chmod(0o640)
        (root / "srv/large").chmod(0o4755)
        (root / "empty").chmod(0o1777)
        (root / os.fsdecode(b"no\xffutf8")).write_bytes(b"bytes in a name")
        (root / "escape\x1b[31m\nline").write_bytes(b"a name that no terminal should see")
        os.mkfifo(root / "etc/pipe")
        with (root / "srv/preallocated").open("wb") as file:
            file.write(b"begun" * 1000)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, MIB)
    for number, path in enumerate(sorted(root.rglob("*"))):
        stamp = 1_600_000_000_000_000_000 + number * 2_000_000_000
        os.utime(path, ns=(stamp, stamp), follow_symlinks=False)


@contextmanager
def loop_mounted(image: Path, kind: Kind, *options: str) -> Iterator[Path]:
    """Mount one partition of an image as its system does; skip where the host does not let us."""
    if os.geteuid() != 0:
        pytest.skip("host: mounting needs root")
    with tempfile.TemporaryDirectory(prefix="sb-mnt-") as folder:
        at = ("--offset", str(start_of(kind)), "--sizelimit", str(kind.size))
        read_only = ("--read-only",) if "ro" in options else ()
        attached = try_run("losetup", "--find", "--show", *read_only, *at, str(image))
        if attached.code != 0:
            pytest.skip(f"host: no loop devices: {attached.err.strip()}")
        loop = attached.out.strip()
        try:
            words = ["-o", ",".join(options)] if options else []
            program = ["ntfs-3g"] if kind.name == "ntfs" else ["mount"]
            ran = try_run(*program, *words, loop, folder)
            if ran.code != 0:
                pytest.skip(f"host: {kind.name} cannot be mounted here: {ran.err.strip()}")
            try:
                yield Path(folder)
            finally:
                run("umount", folder)
        finally:
            run("losetup", "--detach", loop)


def make_disk(image: Path) -> None:
    """Write the disk: a GPT, and in each partition a filesystem with the tree."""
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    table = ["label: gpt", *(f"start={start_of(k) // 512}, size={k.size // 512}" for k in KINDS)]
    subprocess.run(
        ["sfdisk", "-q", str(image)],
        input="\n".join(table),
        text=True,
        check=True,
        capture_output=True,
    )
    for kind in KINDS:
        with tempfile.TemporaryDirectory(prefix="sb-tree-") as folder:
            part = Path(folder) / "part"
            with part.open("wb") as file:
                file.truncate(kind.size)
            _format(part, kind)
            run("dd", f"if={part}", f"of={image}", "bs=1M", f"seek={start_of(kind) // MIB}",
                "conv=notrunc,sparse")  # fmt: skip
        if kind.name == "vfat":
            _fill_vfat(image, kind)
        else:
            with loop_mounted(image, kind) as top:
                grow(top, kind)


def _format(part: Path, kind: Kind) -> None:
    testing = {"TEST_DIR": "1", "TEST_DEV": "1", "QA_CHECK_FS": "1"}
    make = {
        "ext4": ["mkfs.ext4", "-q", "-F", "-O", "inline_data", "-I", "512", "-L", "root"],
        "xfs": ["mkfs.xfs", "-q", "-f", "-L", "data"],
        "btrfs": ["mkfs.btrfs", "-q", "-f", "-L", "pool"],
        "ntfs": ["mkfs.ntfs", "-q", "-F", "-L", "win"],
        "vfat": ["mkfs.vfat", "-F", "32", "-n", "ESP"],
    }[kind.name]
    subprocess.run([*make, str(part)], check=True, capture_output=True, env=os.environ | testing)


def _fill_vfat(image: Path, kind: Kind) -> None:
    with tempfile.TemporaryDirectory(prefix="sb-tree-") as folder:
        grow(Path(folder), kind)
        inside = f"{image}@@{start_of(kind)}"
        for entry in sorted(Path(folder).iterdir()):
            run("mcopy", "-s", "-m", "-i", inside, str(entry), "::/")
