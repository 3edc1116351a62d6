"""Filesystems of snapshots and clones, mounted beside the live ones, which stay in use."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mounted import as_file, clear
from processes import wait_until
from serving import MIB, Served, run, try_run, volume_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("rooted"),
    pytest.mark.needs(
        "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "mkfs.ntfs", "mount.ntfs-3g", "sfdisk", "nbdfuse"
    ),
]

MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
    "ntfs": ["mkfs.ntfs", "-q", "-F", "-f"],
}
SIZES = {"ext4": 48, "xfs": 304, "btrfs": 120, "ntfs": 24}
"""MiB; as small as each can be made."""
FREEZABLE = ("ext4", "xfs", "btrfs")


@dataclass
class Live:
    """The disk with all filesystems, served, and each of them mounted and in use."""

    served: Served
    place: Path
    numbers: dict[str, int] = field(default_factory=dict)
    points: dict[str, Path] = field(default_factory=dict)

    def snapshot(self, name: str, *, is_frozen: bool = True) -> None:
        """Take one of everything; frozen: of filesystems without anything left to replay."""
        frozen: list[str] = []
        if is_frozen:
            run("sync")
        try:
            for kind in FREEZABLE if is_frozen else ():
                run("fsfreeze", "--freeze", str(self.points[kind]))
                frozen.append(kind)
            self.served.snapshot(name, "--only-these", "--include", "all")
        finally:
            for kind in frozen:
                run("fsfreeze", "--unfreeze", str(self.points[kind]))

    def target(self, name: str) -> Path:
        directory = self.place / name
        directory.mkdir(exist_ok=True)
        return directory

    def mount(self, ref: str, kind: str, *words: str, name: str = "m") -> Path:
        directory = self.target(f"{name}-{kind}")
        number = str(self.numbers[kind])
        self.served.cli("mount", ref, str(directory), "--partition", number, *words)
        return directory


def tree(root: Path) -> dict[str, str]:
    """Every file below a directory: what it is, and what is in it."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "directory"
    return found


def fill(root: Path, *, seed: int) -> None:
    dice = random.Random(seed)
    (root / "a" / "deep" / "place").mkdir(parents=True, exist_ok=True)
    for number in range(25):
        folder = root if number % 2 else root / "a" / "deep" / "place"
        (folder / f"file-{number}").write_bytes(dice.randbytes(dice.randint(0, 90_000)))
    with (root / "sparse").open("wb") as file:
        file.write(b"start")
        file.seek(300_000)
        file.write(b"end")
    if not (root / "a" / "link").is_symlink():
        (root / "a" / "link").symlink_to("../file-1")


def changes(root: Path, *, seed: int) -> None:
    """What a rehearsal may do."""
    for number in range(0, 25, 3):
        next(root.rglob(f"file-{number}")).unlink()
    fill(root / "a", seed=seed)
    run("sync", "--file-system", str(root))


def digests(served: Served, *exports: str | None) -> list[str]:
    return [hashlib.sha256(served.read(export)).hexdigest() for export in exports]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """GPT, four partitions, each mounted from a loop device on the live disk."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("host: mounting needs root and loop devices")
    with ExitStack() as stack:
        home = Path(stack.enter_context(_folder()))
        place = Path(stack.enter_context(_folder()))
        origin = home / "disk.img"
        starts = {}
        at = 1
        for kind, size in SIZES.items():
            starts[kind] = at
            at += size
        with origin.open("wb") as file:
            file.truncate((at + 1) * MIB)
        lines = "".join(f"start={starts[k] * 2048}, size={SIZES[k] * 2048}\n" for k in SIZES)
        subprocess.run(
            ["sfdisk", "-q", str(origin)], input=f"label: gpt\n{lines}", text=True, check=True
        )
        for kind, size in SIZES.items():
            made = home / kind
            with made.open("wb") as file:
                file.truncate(size * MIB)
            run(*MAKE[kind], str(made))
            run(
                "dd", f"if={made}", f"of={origin}", "bs=1M", f"seek={starts[kind]}",
                "conv=notrunc,sparse", "status=none",
            )  # fmt: skip
            made.unlink()
        served = stack.enter_context(volume_of(origin, str(home))).start()
        stack.callback(clear, place)
        stack.callback(lambda: served.process is not None and served.stop())
        made_live = Live(served=served, place=place)
        file, _ = stack.enter_context(as_file(served))
        for number, (kind, size) in enumerate(SIZES.items(), start=1):
            loop = run(
                "losetup", "--find", "--show", "--offset", str(starts[kind] * MIB),
                "--sizelimit", str(size * MIB), str(file),
            ).out.strip()  # fmt: skip
            stack.callback(try_run, "losetup", "--detach", loop)
            point = made_live.target(f"live-{kind}")
            run("mount", *(["-t", "ntfs-3g"] if kind == "ntfs" else []), loop, str(point))
            stack.callback(try_run, "umount", str(point))
            fill(point, seed=number)
            made_live.numbers[kind], made_live.points[kind] = number, point
        made_live.snapshot("monday")
        yield made_live


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sb-")


def test_every_file_of_a_snapshot_is_read_beside_the_live_filesystem(live):
    """And the snapshot is what it was, bit for bit: reading it changed nothing."""
    before = digests(live.served, "monday")
    wanted = {kind: tree(live.points[kind]) for kind in SIZES}
    for kind in SIZES:
        fill(live.points[kind], seed=90)  # the live one goes on
    for kind in SIZES:
        point = live.mount("web@monday", kind)
        assert tree(point) == wanted[kind], kind
        with pytest.raises(OSError, match="Read-only"):
            (point / "new").touch()
    listed = live.served.cli("mount", "--json").json["mounts"]
    assert sorted(one["where"] for one in listed) == sorted(
        str(live.place / f"m-{kind}") for kind in SIZES
    )
    assert all(one["is_whole"] and one["is_read_only"] for one in listed)
    refused = live.served.try_cli("volume", "release", "web")
    assert refused.code == 1
    assert all(f"{live.place}/m-{kind}" in refused.err for kind in SIZES)
    live.served.cli("unmount", "web@monday")
    assert digests(live.served, "monday") == before
    assert live.served.cli("mount", "--json").json["mounts"] == []
    assert not any(str(live.served.folder) in text for text in _backing_files())


def _backing_files() -> list[str]:
    return [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_only_the_journal_knows_is_there_once_it_is_replayed_on_a_clone(live, kind):
    point = live.points[kind]
    for number in range(20):
        with (point / f"journal-{number}").open("wb") as file:
            file.write(b"in the journal")
            os.fsync(file.fileno())
    live.snapshot(f"dirty-{kind}", is_frozen=False)
    before = digests(live.served, f"dirty-{kind}")
    plain = live.mount(f"web@dirty-{kind}", kind)
    replayed = live.mount(f"web@dirty-{kind}", kind, "--replay", name="replayed")
    there = {path.name for path in replayed.glob("journal-*")}
    assert there == {f"journal-{number}" for number in range(20)}
    assert not {path.name for path in plain.glob("journal-*")} >= there
    with pytest.raises(OSError, match="Read-only"):
        (replayed / "new").touch()
    assert len(live.served.cli("clone", "list", "web", "--json").json["clones"]) == 1
    live.served.cli("unmount", f"web@dirty-{kind}")
    assert live.served.cli("clone", "list", "web", "--json").json["clones"] == []
    assert digests(live.served, f"dirty-{kind}") == before
    live.served.cli("snapshot", "delete", f"web@dirty-{kind}", "--yes")


CHECK = {
    "ext4": ["fsck.ext4", "-f", "-n"],
    "xfs": ["xfs_repair", "-n"],
    "btrfs": ["btrfs", "check", "--readonly"],
    "ntfs": ["ntfsfix", "--no-action"],
}


@pytest.mark.needs("fsck.ext4", "xfs_repair", "btrfs", "ntfsfix", "fsfreeze")
def test_a_clone_is_changed_and_checked_while_the_live_disk_is_under_load(live):
    """Nothing of it shows anywhere else, it outlives a restart, and its space comes back."""
    served = live.served
    served.cli("clone", "create", "web@monday+other")
    held = served.cli("clone", "list", "web", "--json").json["stored_bytes"]
    served.cli("clone", "create", "web@monday+x")
    before = digests(served, "monday", "monday+other")
    is_over = threading.Event()

    def load() -> None:
        number = 0
        while not is_over.is_set():
            path = live.points["ext4"] / f"load-{number % 5}"
            path.write_bytes(random.Random(number).randbytes(40_000))
            number += 1

    thread = threading.Thread(target=load)
    thread.start()
    wanted = {}
    try:
        for kind in SIZES:
            point = live.mount("web@monday+x", kind, name="x")
            changes(point, seed=500)
            wanted[kind] = tree(point)
    finally:
        is_over.set()
        thread.join()
    assert not list(live.points["xfs"].glob("a/file-*"))
    refused = served.try_cli("clone", "delete", "web@monday+x", "--yes")
    assert refused.code == 1, refused.out
    served.cli("unmount", "web@monday+x")
    images = live.target("still")
    served.cli("mount", "--images", "web", str(images))
    for kind, number in live.numbers.items():
        run(*CHECK[kind], str(images / "@monday+x.parts" / f"p{number}.raw"))
    served.cli("unmount", str(images))
    assert digests(served, "monday", "monday+other") == before
    x = digests(served, "monday+x")
    assert x != before[:1]
    for kind in SIZES:
        assert tree(live.mount("web@monday+x", kind, "--read-only", name="x")) == wanted[kind]
    served.cli("unmount", "web@monday+x")
    served.cli("clone", "delete", "web@monday+x", "--yes")
    assert served.cli("clone", "list", "web", "--json").json["stored_bytes"] == held
    served.cli("clone", "delete", "web@monday+other", "--yes")
    assert digests(served, "monday") == before[:1]


def test_a_throw_away_clone_goes_with_its_mount_whoever_unmounts_it(live):
    before = digests(live.served, "monday")
    point = live.mount("web@monday", "btrfs", "--writable", name="w")
    changes(point, seed=7)
    assert live.served.cli("clone", "list", "web", "--json").json["clones"] != []
    run("umount", str(point))
    # The server looks every other second.
    assert wait_until(
        lambda: live.served.cli("clone", "list", "web", "--json").json["clones"] == []
    )
    assert live.served.cli("mount", "--json").json["mounts"] == []
    assert digests(live.served, "monday") == before


def test_a_mount_that_fails_leaves_nothing(live):
    served = live.served
    before = set(Path("/sys/block").glob("loop*/loop/backing_file"))
    several = served.try_cli("mount", "web@monday", str(live.target("f")))
    assert several.code == 2
    assert "--partition: 1 (ext" in several.err
    wrong = served.try_cli("mount", "web@monday", str(live.target("f")), "--partition", "9")
    assert wrong.code == 1
    served.cli("clone", "create", "web@monday+broken")
    with served.client("monday+broken") as client:
        client.pwrite(bytes(4), offset=MIB + 1024 + 40)  # inodes in a group
    broken = served.try_cli("mount", "web@monday+broken", str(live.target("f")), "--partition", "1")
    assert broken.code == 1, broken.out
    hidden = served.try_cli("mount", "web@monday", str(served.folder), "--partition", "1")
    assert "would hide" in hidden.err
    served.cli("clone", "delete", "web@monday+broken", "--yes")
    assert served.cli("mount", "--json").json["mounts"] == []
    assert set(Path("/sys/block").glob("loop*/loop/backing_file")) == before
    assert not list((served.folder / "s" / "mounts").glob("*.json"))
