"""`snapshot diff --files` tells what somebody did to real filesystems between two snapshots."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from filesystems import KINDS, TOOLS, Kind, loop_mounted, make_disk, start_of
from mounted import as_file
from serving import MIB, Served, run, volume_of

pytestmark = [pytest.mark.needs(*TOOLS, "nbdfuse", "mdel"), pytest.mark.slow]

MOUNTED = tuple(kind for kind in KINDS if kind.name != "vfat")


def in_place(path: Path, data: bytes, *, at: int = 0, keeps_time: bool = False) -> None:
    """Write over a part of a file; the time it shows may stay what it was."""
    before = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    if keeps_time:
        os.utime(path, ns=(before, before))


def change(top: Path, kind: Kind) -> dict[str, str]:
    """Do to a tree what can be done; return what of it should be told, by path."""
    data = top / "srv/data"
    in_place(top / "etc/tiny", b"TINY\n")
    in_place(top / "srv/large", random.Random(5).randbytes(5000), at=MIB + 77, keeps_time=True)
    same = (data / "file 4").read_bytes()
    in_place(data / "file 4", same, keeps_time=True)
    os.utime(data / "file 3", ns=(10**18, 10**18))
    os.truncate(data / "file 5", 100)
    (data / "file 6").unlink()
    (data / "file 8").rename(top / "renamed")
    (top / "srv/new/deep").mkdir(parents=True)
    (top / "srv/new/deep/file").write_bytes(random.Random(6).randbytes(70_000))
    (data / "file 9").unlink()
    (data / "file 9").mkdir()
    in_place(top / "var/cache/c0", b"never held")
    told = {
        "/etc/tiny": "changed",
        "/second name": "changed",
        "/srv/large": "changed",
        "/srv/data/file 3": "metadata",
        "/srv/data/file 5": "changed",
        "/srv/data/file 6": "went",
        "/srv/data/file 8": "went",
        "/renamed": "appeared",
        "/srv/new": "appeared",
        "/srv/new/deep": "appeared",
        "/srv/new/deep/file": "appeared",
        "/srv/data/file 9": "went, appeared",
        "/var/cache/c0": "unknown",
    }
    if kind.name == "btrfs":
        told["/var/cache/c0"] = "changed"  # it is written elsewhere, and so told by its place
    if kind.has_modes:
        (data / "file 7").chmod(0o600)
        (top / "etc/link").unlink()
        (top / "etc/link").symlink_to("elsewhere")
        (top / "empty").chmod(0o700)
        told |= {"/srv/data/file 7": "metadata", "/etc/link": "changed", "/empty": "metadata"}
    return told


@pytest.fixture(scope="module")
def diff(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, str]]]]:
    """What the command tells of each place, and what was done there."""
    folder = tmp_path_factory.mktemp("changes")
    make_disk(folder / "disk.img")
    done: dict[str, dict[str, str]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="sb-") as short,
        volume_of(folder / "disk.img", short) as served,
    ):
        served.cli("rules", "set", "web", "--exclude", "path:/var/cache/**", "--exclude", "free")
        served.start()
        served.snapshot("monday")
        with as_file(served) as (live, _):
            for kind in MOUNTED:
                with loop_mounted(live, kind) as top:
                    done[kind.name] = change(top, kind)
            done["vfat"] = change_vfat(live, folder)
        served.snapshot("tuesday")
        told = served.try_cli("snapshot", "diff", "web@monday", "web@tuesday", "--files", "--json")
        assert told.code == 3, told.err
        shown = served.try_cli("snapshot", "diff", "web@monday", "web@tuesday", "--files")
        yield told.json | {"shown": shown.out}, done
        check_errors(served)


def change_vfat(live: Path, folder: Path) -> dict[str, str]:
    (kind,) = (kind for kind in KINDS if kind.name == "vfat")
    inside = f"{live}@@{start_of(kind)}"
    (folder / "new").write_bytes(b"new content, and longer")
    run("mcopy", "-o", "-i", inside, str(folder / "new"), "::/etc/tiny")
    run("mdel", "-i", inside, "::/srv/data/file 6")
    return {"/etc/tiny": "changed", "/srv/data/file 6": "went"}


def check_errors(served: Served) -> None:
    alone = served.try_cli("snapshot", "diff", "web@monday", "--files")
    assert alone.code == 2
    assert "between two snapshots" in alone.err


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_was_done_is_told_and_nothing_else(
    diff: tuple[dict[str, Any], dict[str, dict[str, str]]], kind: Kind
) -> None:
    told, done = diff
    (place,) = (p for p in told["places"] if p["place"] == f"part:{kind.number}")
    found: dict[str, str] = {}
    for entry in place["changes"]:
        before = found.get(entry["path"])
        found[entry["path"]] = f"{before}, {entry['change']}" if before else entry["change"]
    expected = done[kind.name]
    if kind.name == "ntfs":
        # The FUSE driver writes names and times into other places of a record as it likes.
        found.pop("/", None)
    assert found == expected
    assert place["reason"] == ""
    assert place["skipped"] == []
    assert place["file_bytes"] > 0
    assert place["metadata_bytes"] > 0


def test_sizes_and_reasons_come_with_it(
    diff: tuple[dict[str, Any], dict[str, dict[str, str]]],
) -> None:
    told, _ = diff
    for kind in MOUNTED:
        (place,) = (p for p in told["places"] if p["place"] == f"part:{kind.number}")
        changes = {entry["path"]: entry for entry in place["changes"]}
        large = changes["/srv/large"]
        assert large["size_before"] == large["size_after"] == 3 * MIB + 17
        assert 5000 <= large["changed_bytes"] <= 64 * 1024
        new = changes["/srv/new/deep/file"]
        assert (new["size_before"], new["size_after"]) == (None, 70_000)
        assert new["changed_bytes"] == 70_000
        assert changes["/srv/data/file 5"]["size_after"] == 100
        if kind.name != "btrfs":
            assert changes["/var/cache/c0"]["note"] == "left out by path:/var/cache/**"


def test_every_changed_byte_is_somebodys(
    diff: tuple[dict[str, Any], dict[str, dict[str, str]]],
) -> None:
    told, _ = diff
    parts = ("file_bytes", "metadata_bytes", "free_bytes", "other_bytes")
    total = sum(place[part] for place in told["places"] for part in parts)
    assert total == told["changed_bytes"] + told["newly_selected_bytes"]


def test_people_read_the_same(diff: tuple[dict[str, Any], dict[str, dict[str, str]]]) -> None:
    shown = diff[0]["shown"]
    assert 'part:1 ext4 "root"\n' in shown
    assert "/srv/new/deep/\n" in shown
    assert "left out by path:/var/cache/**" in shown
    assert "\x1b" not in shown
