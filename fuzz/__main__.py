"""Damage filesystems for as long as you like: `python -m fuzz ext --seconds 600 [--seed N]`.

The same as the damage tests of the readers, with ever new seeds: a failure prints the seed and
keeps the image. Images are made with mkfs and mounted, so this needs root. Formats with checksums
are damaged in their metadata as it lies there, the others (NTFS, FAT) structure by structure.
"""

import argparse
import collections
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from stillblock.selection.filesystems import open_filesystem  # noqa: E402 the path comes first
from unit.selection.filesystems import (  # noqa: E402
    btrfs_images,
    ext_images,
    test_exfat,
    test_fat,
    test_ntfs,
    xfs_images,
)
from unit.selection.filesystems.damage_cases import Damageable, check_damages  # noqa: E402
from unit.selection.filesystems.mutation import Subject, examine, try_one  # noqa: E402

CASES_A_SEED = 20
"""Damages under one seed where each is small."""


class Target(NamedTuple):
    """An image, and what damages it under a seed and says how its reader took that."""

    content: bytes
    try_seed: Callable[[int], str]


def _by_metadata(subject: Subject) -> Target:
    return Target(subject.content, lambda seed: try_one(seed, subject))


def _by_structure(image: Damageable) -> Target:
    def try_seed(seed: int) -> str:
        seen = check_damages(image, seed=seed, count=CASES_A_SEED)
        return "resolved in part" if seen else "unresolved"

    return Target(image.content, try_seed)


def _ext(folder: Path) -> dict[str, Target]:
    targets = {}
    for name in ext_images.SMALL:
        content = ext_images.small_image(folder, name)
        subject = examine(content, open_filesystem, blind=ext_images.invisible(content))
        targets[name] = _by_metadata(subject)
    return targets


def _xfs(folder: Path) -> dict[str, Target]:
    targets = {}
    for name in ("unmounted", "with changes in its log"):
        image = xfs_images.small_image(folder, is_settled=name == "unmounted")
        targets[name] = _by_metadata(examine(image.read_bytes(), open_filesystem))
    return targets


def _btrfs(folder: Path) -> dict[str, Target]:
    content = btrfs_images.small_image(folder).read_bytes()
    return {"btrfs": _by_metadata(examine(content, open_filesystem))}


def _ntfs(folder: Path) -> dict[str, Target]:
    return {"ntfs": _by_structure(test_ntfs.damageable(folder))}


def _fat(folder: Path) -> dict[str, Target]:
    targets = {}
    for kind in test_fat.KINDS:
        (folder / kind).mkdir()
        targets[kind] = _by_structure(test_fat.damageable(folder / kind, kind))
    return targets


def _exfat(folder: Path) -> dict[str, Target]:
    return {"exfat": _by_structure(test_exfat.damageable(test_exfat.small_volume(folder)))}


FILESYSTEMS = {
    "btrfs": _btrfs,
    "exfat": _exfat,
    "ext": _ext,
    "fat": _fat,
    "ntfs": _ntfs,
    "xfs": _xfs,
}


def main() -> int:
    """Run until the time is over or something is wrong; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("filesystem", choices=sorted(FILESYSTEMS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    targets = FILESYSTEMS[options.filesystem](folder)
    print(f"{', '.join(targets)}: from seed {options.seed}")
    outcomes: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + options.seconds
    seed = options.seed
    while time.monotonic() < end:
        for name, target in targets.items():
            try:
                outcomes[target.try_seed(seed)] += 1
            except Exception:
                image = folder / "failed"
                image.write_bytes(target.content)
                print(f"{name}: seed {seed}, image {image}", file=sys.stderr)
                raise
        seed += 1
    print(f"{seed - options.seed} seeds: {dict(outcomes)}")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
