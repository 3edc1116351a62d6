"""Filesystems of a snapshot, replayed and checked on a throw-away clone."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mounted import clear, ours, require_fuse
from serving import MIB, Served, run, volume_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.needs("mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair", "sfdisk"),
]

EXT4_AT, EXT4_MIB = MIB, 24
XFS_AT, XFS_MIB = 25 * MIB, 304
ALL = ("--only-these", "--include", "all")


@pytest.fixture
def disk() -> Iterator[Served]:
    """GPT with an ext4 full of files, an XFS and a swap area, served."""
    require_fuse()
    with tempfile.TemporaryDirectory(prefix="sb-verify-") as folder:
        files, image = Path(folder) / "files", Path(folder) / "disk.img"
        for number in range(200):
            (files / f"d{number % 7}").mkdir(parents=True, exist_ok=True)
            (files / f"d{number % 7}" / f"f{number}").write_bytes(os.urandom(3000))
        with image.open("wb") as disk:
            disk.truncate(XFS_AT + XFS_MIB * MIB + 9 * MIB)
        table = f"label: gpt\nsize={EXT4_MIB}M\nsize={XFS_MIB}M\nsize=8M, type=swap\n"
        (Path(folder) / "table").write_text(table)
        run("sh", "-c", f"sfdisk -q --no-tell-kernel {image} < {folder}/table")
        ext4, xfs = Path(folder) / "ext4", Path(folder) / "xfs"
        run("mkfs.ext4", "-q", "-d", str(files), str(ext4), f"{EXT4_MIB}M")
        run("mkfs.xfs", "-q", "-d", f"name={xfs},size={XFS_MIB}m,file")
        with image.open("r+b") as disk:
            for part, at in ((ext4, EXT4_AT), (xfs, XFS_AT)):
                disk.seek(at)
                disk.write(part.read_bytes())
        with volume_of(image, folder) as made:
            yield made.start()
            if made.process is not None:
                made.stop()
            clear(made.folder)
            assert ours(made.folder) == ([], [])


def outcomes(told: dict) -> dict[str, str]:
    return {check["place"]: check["outcome"] for check in told["verification"]["checks"]}


def spoil(served: Served) -> None:
    """Overwrite the inode tables of the live ext4, through a client."""
    with served.client() as client:
        client.pwrite(b"\xff" * MIB, offset=EXT4_AT + MIB)
        client.flush()


def test_a_snapshot_that_fails_its_checks_says_so_wherever_it_is_listed(disk):
    taken = disk.cli("snapshot", "create", "web@good", *ALL, "--verify")
    assert "2 filesystems sound" in taken.out
    before = hashlib.sha256(disk.read("good")).hexdigest()
    spoil(disk)
    failed = disk.try_cli("snapshot", "create", "web@bad", *ALL, "--verify", "--json")
    assert failed.code == 4
    told = json.loads(failed.out.splitlines()[-1])
    assert outcomes(told) == {"part:1": "damaged", "part:2": "sound"}
    listed = {
        s["name"]: s["verified"]
        for s in disk.cli("snapshot", "list", "web", "--json").json["snapshots"]
    }
    assert listed == {"good": "sound", "bad": "damaged"}
    assert "VERIFICATION FAILED" in disk.cli("snapshot", "list", "web").out
    receipt = disk.cli("snapshot", "receipt", "web@bad", "--json").json
    assert receipt["verification"]["outcome"] == "damaged"
    assert receipt["is_intact"], "what is found later is no change of what was written down"
    assert "e2fsck" in disk.cli("snapshot", "receipt", "web@bad").out
    # It was looked at on clones, which are gone, and nothing else was changed.
    assert disk.cli("clone", "list", "web", "--json").json["clones"] == []
    assert disk.cli("mount", "--json").json["mounts"] == []
    assert hashlib.sha256(disk.read("good")).hexdigest() == before
    assert outcomes(disk.cli("snapshot", "verify", "web@good", "--json").json)["part:1"] == "sound"


def test_a_command_of_the_users_may_judge(disk):
    disk.snapshot("now", *ALL)
    look = ("sh", "-c", 'test "$(stat -c %s "$STILLBLOCK_IMAGE")" -gt 300000000')
    told = disk.cli("snapshot", "verify", "web@now", "--json", "--", *look).json
    assert told["verification"]["outcome"] == "sound"
    failed = disk.try_cli("snapshot", "verify", "web@now", "--", "false")
    assert failed.code == 4
    assert (
        disk.cli("snapshot", "show", "web@now", "--json").json["snapshot"]["verified"] == "damaged"
    )


def test_what_is_left_out_is_not_looked_at_and_nothing_at_all_is_no_good_word(disk):
    disk.snapshot("part", "--only-these", "--include", "part:2")
    told = disk.cli("snapshot", "verify", "web@part", "--json").json
    assert outcomes(told) == {"part:1": "left-out", "part:2": "sound"}
    disk.snapshot("none", "--only-these", "--include", "0-1MiB")
    nothing = disk.try_cli("snapshot", "verify", "web@none", "--json")
    assert nothing.code == 3
    assert nothing.json["verification"]["outcome"] == "unchecked"
