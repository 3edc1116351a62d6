"""What rules of files cost: a filesystem with many files, resolved as a snapshot does it.

Time and memory are those of the process that asks and of the worker that reads, each measurement in
processes of its own.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError, MissingToolError
from bench.tables import Table, as_text
from bench.units import GIB, KIB, MIB

GOAL_S, GOAL_MIB = 2.0, 300
FILES_PER_DIRECTORY = 50
FILESYSTEMS = ("ext4", "xfs", "ntfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many files on which filesystems, and how often each is resolved."""

    file_count: int
    filesystems: tuple[str, ...]
    round_count: int


def measure(plan: Plan, *, parent: Path | None) -> bool:
    """Print a table; return whether the goals are met."""
    rows, is_met = [], True
    with tempfile.TemporaryDirectory(prefix="stillblock-words-", dir=parent) as scratch:
        for kind in plan.filesystems:
            image = Path(scratch) / f"{kind}.img"
            try:
                _make(kind, image, plan.file_count)
            except MissingToolError as error:
                rows.append((kind, str(plan.file_count), str(error), "", "", "", ""))
                is_met = False
                continue
            found = min(
                (_resolve(image) for _ in range(plan.round_count)), key=lambda one: one["wall_s"]
            )
            image.unlink()
            if found["files"] != plan.file_count:
                raise BenchError(f"{kind}: {found['files']} of {plan.file_count} files were found")
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


def _resolve(image: Path) -> dict[str, float]:
    shown = subprocess.run(
        [sys.executable, "-m", "bench.words_probe", image],
        check=False,
        capture_output=True,
        text=True,
    )
    if shown.returncode != 0:
        raise BenchError(f"resolving failed: {shown.stderr.strip()}")
    found: dict[str, float] = json.loads(shown.stdout)
    return found


# -- filesystems


def _make(kind: str, image: Path, file_count: int) -> None:
    size_bytes = max(GIB, file_count * 64 * KIB)
    with image.open("wb") as file:
        file.truncate(size_bytes)
    if kind == "ext4":
        tree = image.with_suffix(".tree")
        _fill(tree, file_count)
        _run("mkfs.ext4", "-q", "-F", "-d", str(tree), str(image))
        shutil.rmtree(tree)
        return
    mount: Callable[[Path], None]
    if kind == "xfs":
        _run("mkfs.xfs", "-q", "-f", str(image))
        mount = lambda where: _run("mount", "-o", "loop", str(image), str(where))  # noqa: E731
    else:
        _run("mkfs.ntfs", "-q", "-F", "-f", str(image))
        mount = lambda where: _run("ntfs-3g", str(image), str(where))  # noqa: E731
    where = image.with_suffix(".mnt")
    where.mkdir()
    mount(where)
    try:
        _fill(where, file_count)
    finally:
        _run("umount", str(where))
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


def _run(*command: str) -> None:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(command[0], path=path)
    if found is None:
        raise MissingToolError(f"{command[0]} is missing")
    ran = subprocess.run([found, *command[1:]], check=False, capture_output=True, text=True)
    if ran.returncode != 0:
        raise MissingToolError(f"{command[0]} does not work here: {ran.stderr.strip()[:80]}")
