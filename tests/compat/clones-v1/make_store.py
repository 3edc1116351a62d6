"""Make a small real store with clones, and what it must hold.

    python tests/compat/clones-v1/make_store.py DIR

writes DIR/volume.tar.xz and DIR/expected.json. The ones beside this script were made once, by the
first version that had clones, and are never made again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import stillblock
from stillblock.operations import clones
from stillblock.operations.clones import CloneChange, CloneRequest

BLOCK = 4096
BLOCKS = 48
SIZE = BLOCKS * BLOCK + 1024
EXCLUDED = range(32, 40)


def content(length: int, which: str) -> bytes:
    line = f"{which}\n".encode()
    return (line * (length // len(line) + 1))[:length]


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def tell(directory: Path) -> dict[str, object]:
    """Run the story in a directory; return what has to be true of the result."""
    origin = directory / "disk.img"
    live = bytearray(content(SIZE, "first"))
    origin.write_bytes(live)
    stillblock.create(
        "web", origin=origin, store=directory / "store", state_dir=directory / "state"
    )
    models: dict[str, bytearray] = {}
    own: dict[str, set[int]] = {}
    infos = {}
    with stillblock.open("web", state_dir=directory / "state") as volume:
        opened = volume._opened
        volume.snapshot("monday", exclude=["128KiB-160KiB"])
        monday = bytearray(live)
        monday[EXCLUDED.start * BLOCK : EXCLUDED.stop * BLOCK] = bytes(len(EXCLUDED) * BLOCK)

        def write(name: str, offset: int, length: int) -> None:
            data = content(length, f"{name} {offset}")
            disk = opened.engine.open_clone(number=infos[name].number)
            disk.pwrite(data, offset=offset)
            disk.flush()
            models[name][offset : offset + length] = data
            own[name] |= set(range(offset // BLOCK, -(-(offset + length) // BLOCK)))

        for name in ("written", "reset", "pristine"):
            infos[name] = clones.create_clone(opened, CloneRequest(snapshot="monday", name=name))
            models[name], own[name] = bytearray(monday), set()
        write("written", 0, BLOCK)
        write("written", 3 * BLOCK + 100, 2 * BLOCK)
        write("written", 33 * BLOCK + 7, 50)
        write("written", SIZE - 300, 300)
        write("reset", 5 * BLOCK, 3 * BLOCK)
        opened.engine.open_clone(number=infos["reset"].number).close()
        clones.reset_clone(opened, CloneChange(snapshot="monday", clone="reset"))
        models["reset"], own["reset"] = bytearray(monday), set()
        write("reset", 9 * BLOCK, 10)
        volume.pwrite(content(4 * BLOCK, "later"), offset=2 * BLOCK)
        live[2 * BLOCK : 6 * BLOCK] = content(4 * BLOCK, "later")
        uuid = opened.engine.uuid
    return {
        "uuid": uuid,
        "size_bytes": SIZE,
        "live": digest(live),
        "monday": digest(monday),
        "clones": [
            {
                "name": name,
                "id": info.id,
                "generation": 2 if name == "reset" else 1,
                "own_blocks": sorted(own[name]),
                "content": digest(models[name]),
            }
            for name, info in infos.items()
        ],
    }


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
