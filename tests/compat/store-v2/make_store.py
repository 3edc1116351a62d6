"""Make a small real store that has index files and merged segments, and what it must hold.

    python tests/compat/store-v2/make_store.py DIR

writes DIR/volume.tar.xz and DIR/expected.json. The ones beside this script were made once, by the
first version that had segments of version 2, and are never made again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import stillblock

BLOCK = 4096
BLOCKS = 64
SIZE = BLOCKS * BLOCK
DAYS = 70
"""More than are kept in memory: an index file is written."""
HOURS = 12
"""Taken and deleted between two that stay: they are merged."""
DEADLINE_S = 60.0


def content(block: int, when: int) -> bytes:
    if block % 5 == 0:
        return bytes(BLOCK)
    line = f"block {block:3} change {when:5}\n".encode()
    return (line * (BLOCK // len(line) + 1))[:BLOCK]


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def wait_for(directory: Path, suffix: str, *, is_there: bool) -> None:
    end = time.monotonic() + DEADLINE_S
    while bool(list(directory.glob(suffix))) != is_there:
        if time.monotonic() > end:
            raise TimeoutError(f"no change of {suffix} in {directory}")
        time.sleep(0.05)


def tell(directory: Path) -> dict[str, object]:
    """Run the story in a directory; return what has to be true of the result."""
    origin, log = directory / "disk.img", directory / "store" / "log"
    live = bytearray(b"".join(content(block, 0) for block in range(BLOCKS)))
    origin.write_bytes(live)
    stillblock.create(
        "web", origin=origin, store=directory / "store", state_dir=directory / "state"
    )
    known: dict[str, dict[str, object]] = {}
    changed: dict[str, set[int]] = {}

    def write(volume: stillblock.Volume, block: int, when: int) -> None:
        volume.pwrite(content(block, when), offset=block * BLOCK)
        live[block * BLOCK : (block + 1) * BLOCK] = content(block, when)
        for blocks in changed.values():
            blocks.add(block)

    with stillblock.open("web", state_dir=directory / "state") as volume:
        first = volume.snapshot("first")
        known["first"] = {"content": digest(live), "id": first.id}
        changed["first"] = set()
        for hour in range(HOURS):
            scrap = volume.snapshot(f"hour-{hour}")
            for block in (hour, hour + 1, 40 + hour):
                write(volume, block, 1 + hour)
            volume.flush()
            if hour:
                volume.find(f"hour-{hour - 1}").delete()
        after = volume.snapshot("after")
        known["after"] = {"content": digest(live), "id": after.id}
        changed["after"] = set()
        scrap.delete()
        for day in range(DAYS):
            write(volume, (7 * day) % BLOCKS, 100 + day)
            volume.flush()
            taken = volume.snapshot(f"day-{day}")
            known[taken.name] = {"content": digest(live), "id": taken.id}
            changed[taken.name] = set()
        wait_for(log, "*.idx", is_there=True)
        # Twelve epochs of hours became fewer.
        deadline = time.monotonic() + DEADLINE_S
        while len(list(log.glob("*.seg"))) > DAYS + 2 + HOURS // 2:
            if time.monotonic() > deadline:
                raise TimeoutError("nothing was merged")
            time.sleep(0.05)
        wait_for(log, "*.new", is_there=False)
        uuid = volume._opened.engine.uuid
    for name, blocks in changed.items():
        known[name]["changed_until_now"] = sorted(blocks)
    return {"uuid": uuid, "size_bytes": SIZE, "live": digest(live), "snapshots": known}


def main() -> None:
    """Tell the story in a directory that names no machine, and pack it."""
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stillblock-golden-") as scratch:
        directory = Path(scratch)
        expected = tell(directory)
        with tarfile.open(target / "volume.tar.xz", "w:xz", preset=9) as archive:
            for path in sorted([directory / "disk.img", *(directory / "store").rglob("*")]):
                if path.is_file():
                    info = archive.gettarinfo(path, str(path.relative_to(directory)))
                    info.uid = info.gid = 0
                    info.uname = info.gname = ""
                    with path.open("rb") as file:
                        archive.addfile(info, file)
    text = json.dumps(expected) + "\n"
    (target / "expected.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
