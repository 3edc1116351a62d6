"""Resolves rules of files on one image, and prints what that cost as one JSON object.

`python -m bench.words_probe IMAGE`; bench/words.py reads it.
"""

import json
import resource
import sys
import time
from pathlib import Path

from bench.machine import own_cpu_s
from bench.units import BLOCK_BYTES
from stillblock.operations.disks import open_raw
from stillblock.selection import Rules, resolve, resolve_frozen

RULES = (
    ("exclude", "free"),
    ("exclude", "swap"),
    ("exclude", "path:/**/*.tmp"),
    ("exclude", "path:/**/*.data"),
    ("include", "path:/d1/**"),
)


def main(path: Path) -> None:
    begin = time.perf_counter()
    before_s = own_cpu_s()
    with open_raw(path) as disk:
        instant = resolve(Rules.parse(RULES), disk, block_size=BLOCK_BYTES)
        assert instant.pending is not None, "there is a filesystem"
        final = resolve_frozen(instant.pending, disk)
    elapsed_s, used_s = time.perf_counter() - begin, own_cpu_s() - before_s
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
