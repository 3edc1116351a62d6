"""What rules of files cost: a filesystem with many files, resolved as a snapshot does it.

Time and memory are those of the process that asks and of the worker that reads, each measurement in
processes of its own.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from bench.errors import BenchError, MissingToolError, PeerError
from bench.peers import tool
from bench.probe import run_module
from bench.process import run_tool
from bench.tables import Table, as_text
from bench.units import GIB, KIB, MIB

GOAL_S, GOAL_MIB = 2.0, 300
FILES_PER_DIRECTORY = 50
SCRATCH_BYTES_PER_FILE = 20 * KIB
"""In blocks, and twice: the tree that ext4 is made of lies beside its image."""
PROBE = "bench.words_probe"
REASON_CHARS = 80
"""Of why a filesystem was left out so much stands in the table."""
MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "ntfs": ("mkfs.ntfs", "-q", "-F", "-f"),
}
MOUNT = {"xfs": ("mount", "-o", "loop"), "ntfs": ("ntfs-3g",)}
PACKAGES = {
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkfs.ntfs": "ntfs-3g",
    "ntfs-3g": "ntfs-3g",
    "mount": "mount",
    "umount": "mount",
}
FILESYSTEMS = tuple(MAKE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many files on which filesystems, and how often each is resolved."""

    file_count: int
    filesystems: tuple[str, ...]
    round_count: int


def measure(plan: Plan, *, parent: Path | None) -> bool:
    """Print a table; return whether the goals are met."""
    rows, is_met = [], True
    needed_bytes = plan.file_count * SCRATCH_BYTES_PER_FILE
    with machine.scratch_directory(parent, needed_bytes=needed_bytes) as scratch:
        for kind in plan.filesystems:
            image = scratch.absolute() / f"{kind}.img"
            try:
                _make(kind, image, plan.file_count)
            except (MissingToolError, PeerError) as error:
                rows.append((kind, str(plan.file_count), str(error)[:REASON_CHARS], *[""] * 4))
                is_met = False
                continue
            rounds = [run_module(PROBE, str(image)) for _ in range(plan.round_count)]
            found = min(rounds, key=lambda one: one["wall_s"])
            image.unlink()
            if found["files"] != plan.file_count:
                raise BenchError(
                    f"{kind}: {found['files']:.0f} of {plan.file_count} files were found"
                )
            memory_mib = (found["own_kib"] + found["worker_kib"]) * KIB / MIB
            is_good = found["cpu_s"] < GOAL_S and memory_mib < GOAL_MIB
            is_met = is_met and is_good
            rows.append(
                (
                    kind,
                    str(plan.file_count),
                    f"{found['wall_s']:.2f}",
                    f"{found['cpu_s']:.2f}",
                    f"{memory_mib:.0f}",
                    str(int(found["extents"])),
                    "met" if is_good else "missed",
                )
            )
    heads = ("filesystem", "files", "s", "CPU s", "MiB", "extents", "goal")
    print(as_text(Table(title="Rules of files", rows=(heads, *rows))))
    print(f"Goal: under {GOAL_S:g} s of processor time and {GOAL_MIB} MiB, worker included.")
    return is_met


# -- filesystems


def _make(kind: str, image: Path, file_count: int) -> None:
    size_bytes = max(GIB, file_count * 64 * KIB)
    with image.open("wb") as file:
        file.truncate(size_bytes)
    if kind == "ext4":
        tree = image.with_suffix(".tree")
        _fill(tree, file_count)
        _run(*MAKE[kind], "-d", tree, image)
        shutil.rmtree(tree)
        return
    _run(*MAKE[kind], image)
    where = image.with_suffix(".mnt")
    where.mkdir()
    _run(*MOUNT[kind], image, where)
    try:
        _fill(where, file_count)
    finally:
        _run("umount", where)
        where.rmdir()


def _fill(root: Path, file_count: int) -> None:
    """Files of 1 to 64 KiB, fifty a directory, ten directories a directory."""
    for index in range(file_count):
        directory = index // FILES_PER_DIRECTORY
        folder = root / f"d{directory // 10}" / f"e{directory % 10}"
        if index % FILES_PER_DIRECTORY == 0:
            folder.mkdir(parents=True, exist_ok=True)
        ending = "tmp" if index % 7 == 0 else "data"
        length = 64 * KIB if index % 100 == 0 else KIB * (1 + index % 12)
        (folder / f"file{index}.{ending}").write_bytes(b"x" * length)


def _run(name: str, *words: str | Path) -> None:
    run_tool([tool(name, package=PACKAGES[name]), *map(str, words)])
