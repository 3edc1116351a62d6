"""Damage filesystems for as long as you like: `python -m fuzz ext --seconds 600 [--seed N]`.

The same as the damage tests of the readers, with ever new seeds: a failure prints the seed and
keeps the image. Images are made with mkfs and mounted, so this needs root.
"""

import argparse
import collections
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from stillblock.selection.filesystems import open_filesystem  # noqa: E402 the path comes first
from unit.selection.filesystems import btrfs_images, ext_images, xfs_images  # noqa: E402
from unit.selection.filesystems.mutation import Subject, examine, try_one  # noqa: E402


def _ext_subjects(folder: Path) -> dict[str, Subject]:
    subjects = {}
    for name in ext_images.SMALL:
        content = ext_images.small_image(folder, name)
        subjects[name] = examine(content, open_filesystem, blind=ext_images.invisible(content))
    return subjects


def _xfs_subjects(folder: Path) -> dict[str, Subject]:
    return {
        name: examine(
            xfs_images.small_image(folder, is_settled=name == "unmounted").read_bytes(),
            open_filesystem,
        )
        for name in ("unmounted", "with changes in its log")
    }


def _btrfs_subjects(folder: Path) -> dict[str, Subject]:
    return {"btrfs": examine(btrfs_images.small_image(folder).read_bytes(), open_filesystem)}


FILESYSTEMS = {"btrfs": _btrfs_subjects, "ext": _ext_subjects, "xfs": _xfs_subjects}


def main() -> int:
    """Run until the time is over or something is wrong; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("filesystem", choices=sorted(FILESYSTEMS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    subjects = FILESYSTEMS[options.filesystem](folder)
    print(f"{', '.join(subjects)}: from seed {options.seed}")
    outcomes: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + options.seconds
    seed = options.seed
    while time.monotonic() < end:
        for name, subject in subjects.items():
            try:
                outcomes[try_one(seed, subject)] += 1
            except Exception:
                image = folder / "failed"
                image.write_bytes(subject.content)
                print(f"{name}: seed {seed}, image {image}", file=sys.stderr)
                raise
        seed += 1
    print(f"{seed - options.seed} seeds: {dict(outcomes)}")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
