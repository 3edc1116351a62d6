"""Make a small real store with most kinds of records in it, and what it must hold.

    python tests/compat/store-v1/make_store.py DIR

writes DIR/volume.tar.xz and DIR/expected.json. The ones beside this script were made once, by the
first version that had format 1, and are never made again: they are what an old store looks like.
Another version of a format gets a directory and a script of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import stillblock

BLOCK = 4096
SIZE = 20 * BLOCK + 1536
"""Twenty whole blocks and a part of one."""
ALL = frozenset(range(21))


class Story:
    """The volume, and beside it what the live disk and every snapshot should be."""

    def __init__(self, volume: stillblock.Volume) -> None:
        self.volume = volume
        self.live = bytearray(volume.pread(offset=0, length=SIZE))
        self.snapshots: dict[str, dict[str, object]] = {}
        self.content: dict[str, bytes] = {}
        self.changed: dict[str, set[int]] = {}
        self.tracked: dict[str, frozenset[int]] = {}

    def write(self, offset: int, data: bytes) -> None:
        self.volume.pwrite(data, offset=offset)
        self.volume.flush()
        self._changed(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self.volume.write_zeroes(offset=offset, length=length)
        self.volume.flush()
        self._changed(offset, bytes(length))

    def block(self, index: int, when: str) -> None:
        length = min(BLOCK, SIZE - index * BLOCK)
        self.write(index * BLOCK, pattern(index, when)[:length])

    def take(self, name: str, selected: frozenset[int], **terms: list[str]) -> stillblock.Snapshot:
        snapshot = self.volume.snapshot(name, description=f"the {name} of the story", **terms)
        self.keep(snapshot, selected)
        return snapshot

    def keep(self, snapshot: stillblock.Snapshot, selected: frozenset[int]) -> None:
        content = bytearray(self.live)
        for index in ALL - selected:
            end = min(SIZE, (index + 1) * BLOCK)
            content[index * BLOCK : end] = bytes(end - index * BLOCK)
        self.content[snapshot.name] = bytes(content)
        self.changed[snapshot.name] = set()
        self.tracked[snapshot.name] = selected

    def forget(self, name: str) -> None:
        for known in (self.content, self.changed, self.tracked):
            del known[name]

    def _changed(self, offset: int, data: bytes) -> None:
        self.live[offset : offset + len(data)] = data
        touched = range(offset // BLOCK, -(-(offset + len(data)) // BLOCK))
        for blocks in self.changed.values():
            blocks.update(touched)


def pattern(index: int, when: str) -> bytes:
    line = f"block {index:3} {when:>10}\n".encode()
    return (line * (BLOCK // len(line) + 1))[:BLOCK]


def tell(directory: Path) -> dict[str, object]:
    """Run the story in a directory; return what has to be true of the result."""
    origin = directory / "disk.img"
    first = b"".join(pattern(i, "start") if i != 5 else bytes(BLOCK) for i in sorted(ALL))
    origin.write_bytes(first[:SIZE])
    state = directory / "state"
    stillblock.create("web", origin=origin, store=directory / "store", state_dir=state)
    with stillblock.open("web", state_dir=state) as volume:
        story = Story(volume)
        story.take("monday", ALL)
        for index in (1, 2, 5, 20):  # 5 was zero, 20 is the partial last block
            story.block(index, "monday")
        story.write(3 * BLOCK + 512, b"a part of a block".ljust(512, b"."))
        story.take("tuesday", ALL - frozenset(range(8, 12)), exclude=["32K-48K"])
        for index in (2, 9, 10):  # 9 and 10 only monday wants
            story.block(index, "tuesday")
        story.zero(16 * BLOCK, 2 * BLOCK)
        scrap = story.take("scrap", ALL)
        story.block(2, "scrap")  # what scrap keeps of it nobody else needs
        story.block(12, "scrap")
        story.take("wednesday", frozenset(range(4)), include=["0-16K"])
        story.forget("scrap")
        scrap.delete()
        story.block(1, "wednesday")
        story.block(9, "wednesday")  # tracked by monday, which has its copy already
        mark = volume.find("tuesday").bookmark("mark")
        undo = volume.find("monday").restore(only=["4K-12K"])
        story.keep(undo, ALL)
        monday = story.content["monday"]
        story._changed(BLOCK, monday[BLOCK : 3 * BLOCK])
        story.block(7, "end")
        assert volume.pread(offset=0, length=SIZE) == bytes(story.live)
        expected: dict[str, object] = {
            "uuid": volume._opened.engine.uuid,
            "size_bytes": SIZE,
            "live": digest(story.live),
            "bookmarks": {mark.name: sorted(story.changed["tuesday"] & story.tracked["tuesday"])},
            "snapshots": {
                name: {
                    "content": digest(story.content[name]),
                    "selected": sorted(story.tracked[name]),
                    "changed_until_now": sorted(story.changed[name] & story.tracked[name]),
                    "id": volume.find(name).id,
                }
                for name in story.content
            },
        }
    return expected


def digest(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()


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
                    with path.open("rb") as content:
                        archive.addfile(info, content)
    text = json.dumps(expected, indent=2) + "\n"
    (target / "expected.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
