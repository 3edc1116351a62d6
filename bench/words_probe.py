"""Resolves rules of files on one image, and prints what that cost as one JSON object.

`python -m bench.words_probe IMAGE`; bench/words.py reads it.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

from stillblock.selection import Rules, resolve, resolve_frozen

RULES = (
    ("exclude", "free"),
    ("exclude", "swap"),
    ("exclude", "path:/**/*.tmp"),
    ("exclude", "path:/**/*.data"),
    ("include", "path:/d1/**"),
)


class Image:
    """A disk that is a file."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def pread(self, *, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)


def main(path: Path) -> None:
    begin = time.perf_counter()
    before_s = _cpu_s()
    instant = resolve(Rules.parse(RULES), Image(path), block_size=4096)
    assert instant.pending is not None, "there is a filesystem"
    final = resolve_frozen(instant.pending, Image(path))
    elapsed_s, used_s = time.perf_counter() - begin, _cpu_s() - before_s
    if final.unresolved:
        sys.exit(f"unresolved: {final.unresolved}")
    print(
        json.dumps(
            {
                "wall_s": elapsed_s,
                "cpu_s": used_s,
                "own_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "worker_kib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
                "files": sum(term.file_count for term in final.terms[2:4]),
                "extents": len(final.excluded),
            }
        )
    )


def _cpu_s() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


if __name__ == "__main__":
    main(Path(sys.argv[1]))
