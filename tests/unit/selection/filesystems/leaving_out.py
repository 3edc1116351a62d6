"""The proof that nothing is left out that somebody needs: overwrite it, let the kernel look."""

import os
import stat
from pathlib import Path

from stillblock.extents import normalise, subtract, union
from stillblock.model import Extents
from unit.selection.filesystems.damage_cases import Sight
from unit.selection.filesystems.mounting import MIB, digest, mounted

UNREADABLE = "unreadable"


def overwrite(image: Path, extents: Extents) -> None:
    """Put rubbish there."""
    rubbish = b"\xa5" * MIB
    with image.open("r+b") as file:
        for start, end in extents:
            file.seek(start)
            while file.tell() < end:
                file.write(rubbish[: end - file.tell()])


def regular_files(top: Path) -> list[Path]:
    return sorted(path for path in top.rglob("*") if stat.S_ISREG(path.lstat().st_mode))


def digests_without(image: Path, left_out: Extents) -> dict[str, str]:
    """What each file holds after a mount of an image whose left out bytes are rubbish."""
    overwrite(image, left_out)
    digests = {}
    with mounted(image) as top:
        for path in regular_files(top):
            name = f"/{path.relative_to(top)}"
            try:
                digests[name] = digest(path.read_bytes())
            except OSError:  # of a filesystem with checksums of data
                digests[name] = UNREADABLE
    return digests


def a_third_and_free(sight: Sight) -> tuple[set[str], Extents]:
    """(paths, bytes) left out by terms that mean free space and some third of the files."""
    meant = {path for path in sight.data if digest(os.fsencode(path))[0] in "01234"}
    unmeant_numbers = {number for path, number in sight.numbers.items() if path not in meant}
    excluded = {path for path in meant if sight.numbers[path] not in unmeant_numbers}
    own = normalise(extent for path in excluded for extent in sight.data[path] or ())
    kept = normalise(
        extent for path, data in sight.data.items() if path not in excluded for extent in data or ()
    )
    return excluded, subtract(union(own, sight.free), union(kept, sight.fixed))
