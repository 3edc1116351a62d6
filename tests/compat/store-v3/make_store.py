"""Make a small real store with regions, closed and left open, and what it must hold.

    python tests/compat/store-v3/make_store.py DIR

writes DIR/volume.tar.xz, DIR/cut.tar.xz and DIR/expected.json. The ones beside this script were
made once, by the first version that had segments of version 3, and are never made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import stillblock

BLOCK = 4096
REGION = 256
"""Blocks of a mebibyte."""
BLOCKS = 4 * REGION
FIRST = (3, 4, 10, 300, 1000)
"""Written after the bookmark was left, in three regions."""
NEEDED = 16
"""Blocks that a later snapshot selects."""
SECOND = (3, 20, 21, 50, 301, 511, 600)
"""Written after that snapshot."""


def content(block: int, when: int) -> bytes:
    line = f"block {block:4} change {when:5}\n".encode()
    return (line * (BLOCK // len(line) + 1))[:BLOCK]


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def pack(directory: Path, archive_path: Path) -> None:
    """Pack an origin and its store, without saying whose they were."""
    with tarfile.open(archive_path, "w:xz", preset=9) as archive:
        for path in sorted([directory / "disk.img", *(directory / "store").rglob("*")]):
            if path.is_file():
                info = archive.gettarinfo(path, str(path.relative_to(directory)))
                info.uid = info.gid = 0
                info.uname = info.gname = ""
                with path.open("rb") as file:
                    archive.addfile(info, file)


def tell(directory: Path, cut: Path) -> dict[str, object]:
    """Run the story in a directory, and copy to `cut` what a power cut at its end leaves."""
    origin, store = directory / "disk.img", directory / "store"
    live = bytearray(b"".join(content(block, 0) for block in range(BLOCKS)))
    origin.write_bytes(live)
    stillblock.create("web", origin=origin, store=store, state_dir=directory / "state")

    with stillblock.open("web", state_dir=directory / "state") as volume:

        def write(blocks: tuple[int, ...], when: int) -> None:
            for block in blocks:
                volume.pwrite(content(block, when), offset=block * BLOCK)
                live[block * BLOCK : (block + 1) * BLOCK] = content(block, when)
                # The first one of a region opens it, and the others go straight.
                volume.flush()

        base = volume.snapshot("base", include=["all"], only_these=True)
        base.bookmark()
        base.delete()
        write(FIRST, 1)
        middle = volume.snapshot("middle", include=[f"0-{NEEDED * BLOCK}"], only_these=True)
        held = digest(live[: NEEDED * BLOCK])
        write(SECOND, 2)
        shutil.copytree(store, cut / "store")
        shutil.copy(origin, cut / "disk.img")
        uuid = volume._opened.engine.uuid
    # What no snapshot needs of the regions in use, from the last block that one needs on.
    whole = set(range(NEEDED, 3 * REGION))
    return {
        "uuid": uuid,
        "live": digest(live),
        "middle": {"id": middle.id, "selected": held},
        "since_base": sorted({*FIRST, *SECOND}),
        "from_base_to_middle": sorted(FIRST),
        "since_base_after_a_cut": sorted({*FIRST, *SECOND} | whole),
        "since_middle": [3],
    }


def main() -> None:
    """Tell the story in a directory that names no machine, and pack both ends of it."""
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stillblock-golden-") as scratch:
        directory, cut = Path(scratch), Path(scratch) / "cut"
        cut.mkdir()
        expected = tell(directory, cut)
        pack(directory, target / "volume.tar.xz")
        pack(cut, target / "cut.tar.xz")
    text = json.dumps(expected) + "\n"
    (target / "expected.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
