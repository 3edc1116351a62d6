"""The proof that nothing is left out that somebody needs: overwrite it, let the kernel look."""

import os
from pathlib import Path

from stillblock.extents import normalise, subtract, total_bytes, union
from stillblock.model import Extents
from unit.selection.filesystems.damage_cases import Sight, see
from unit.selection.filesystems.mounting import (
    MIB,
    FileDisk,
    copy_sparse,
    digest,
    mounted,
    regular_files,
)

UNREADABLE = "unreadable"


def overwrite(image: Path, extents: Extents) -> None:
    """Put rubbish there."""
    rubbish = b"\xa5" * MIB
    with image.open("r+b") as file:
        for start, end in extents:
            file.seek(start)
            while file.tell() < end:
                file.write(rubbish[: end - file.tell()])


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


def assert_only_what_is_left_out_is_missed(live: Path) -> Path:
    """Overwrite a third of the files and free space of a live copy: all others are as replayed.

    Return the copy in which that was done, mounted once, for the filesystem's own checker.
    """
    sight = see(FileDisk(live))
    excluded, left_out = a_third_and_free(sight)
    assert total_bytes(subtract(left_out, sight.free)) > 0, "files too"

    replayed = digests_without(copy_sparse(live, live.with_name("replayed")), ())
    after = digests_without(copy := copy_sparse(live, live.with_name("after")), left_out)

    assert UNREADABLE not in replayed.values()
    assert set(after) == set(replayed)
    changed = {path for path in after if after[path] != replayed[path]}
    assert changed <= excluded
    assert changed, "something was left out"
    return copy
