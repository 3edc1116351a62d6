"""Take a snapshot of a volume and copy it into a sparse image, while the volume is open.

    python examples/copy_out.py VOLUME IMAGE

The image has what the snapshot selects; the rest of it is a hole.
"""

import sys
from pathlib import Path

import stillblock

PIECE_BYTES = 1 << 20


def copy_out(snapshot: stillblock.Snapshot, image: Path) -> int:
    """Write a snapshot into a new file; return the bytes copied."""
    copied = 0
    with snapshot.view() as view, image.open("xb") as file:
        file.truncate(view.size)
        for part in view.extents():
            if part.is_zero or not part.is_selected:
                continue
            for offset in range(part.start, part.end, PIECE_BYTES):
                length = min(PIECE_BYTES, part.end - offset)
                file.seek(offset)
                copied += file.write(view.pread(offset=offset, length=length))
    return copied


def main() -> None:
    """Copy a new snapshot out, then delete it."""
    name, image = sys.argv[1], Path(sys.argv[2])
    with stillblock.open(name) as volume:
        snapshot = volume.snapshot(description=f"to be copied to {image}")
        copied = copy_out(snapshot, image)
        snapshot.delete()
    print(f"{copied} bytes of {name} copied to {image}")


if __name__ == "__main__":
    main()
