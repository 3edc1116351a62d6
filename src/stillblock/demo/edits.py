"""A bad day for a filesystem: new files, deleted files, overwritten files, made with debugfs.

debugfs changes a filesystem inside an image as a mounted one would be changed, with metadata,
bitmaps and reused blocks, and needs no root.
"""

import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stillblock.demo.disk import Partition, e2fsprogs

NEW_FILES: Final = 24
NEW_FILE_BYTES: Final = 96 * 1024
DELETED_FILES: Final = 40
OVERWRITTEN_FILES: Final = 60
SCRIPT: Final = "edits.debugfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """Names inside the filesystem, each absolute."""

    written: tuple[str, ...]
    deleted: tuple[str, ...]
    overwritten: tuple[str, ...]

    def describe(self) -> str:
        """Say it in a line."""
        return (
            f"{len(self.written)} files written, {len(self.deleted)} deleted, "
            f"{len(self.overwritten)} overwritten with noise"
        )


def plan_edits(files: Path, *, seed: int) -> Edits:
    """Choose which of the files suffer; the same ones for the same seed."""
    chooser = random.Random(seed)
    names = sorted(f"/{path.relative_to(files)}" for path in files.rglob("*.py"))
    # Names with blanks or quotes would need debugfs's quoting; the library has none.
    names = [name for name in names if name.replace("/", "").replace(".", "").isidentifier()]
    chosen = chooser.sample(names, k=min(len(names), DELETED_FILES + OVERWRITTEN_FILES))
    return Edits(
        written=tuple(f"/new-{number:02}.dat" for number in range(NEW_FILES)),
        deleted=tuple(sorted(chosen[:DELETED_FILES])),
        overwritten=tuple(sorted(chosen[DELETED_FILES:])),
    )


def image_at(image: str, partition: Partition) -> str:
    """Return how e2fsprogs' commands are told of a filesystem inside a disk image."""
    return f"{image}?offset={partition.start}"


def apply_edits(
    edits: Edits, *, image: Path, partition: Partition, files: Path, script: Path, seed: int
) -> None:
    """Make the changes in the filesystem of an image; raise RuntimeError if debugfs refuses."""
    noise = random.Random(seed)
    sources = script.with_suffix(".sources")
    sources.mkdir()
    lines = [f"rm {name}" for name in (*edits.deleted, *edits.overwritten)]
    sizes = dict.fromkeys(edits.written, NEW_FILE_BYTES)
    sizes |= {name: (files / name[1:]).stat().st_size for name in edits.overwritten}
    for number, (name, size_bytes) in enumerate(sizes.items()):
        source = sources / f"{number}"
        source.write_bytes(noise.randbytes(size_bytes))
        # Its "write" takes a name within the current directory, not a path.
        folder, _, leaf = name.rpartition("/")
        lines += [f"cd {folder or '/'}", f"write {source} {leaf}"]
    run_debugfs(lines, image=image_at(str(image), partition), may_write=True, script_file=script)


def run_debugfs(lines: list[str], *, image: str, may_write: bool, script_file: Path) -> str:
    """Run debugfs' own commands and return what they print; raise RuntimeError if one fails."""
    script_file.write_text("".join(f"{line}\n" for line in lines))
    mode = ["-w"] if may_write else []
    ran = subprocess.run(
        [e2fsprogs("debugfs"), *mode, "-f", str(script_file), image],
        capture_output=True,
        text=True,
        check=False,
    )
    # It exits 0 whatever happens; its complaints, past the line with its version, are the sign.
    complaints = [line for line in ran.stderr.splitlines() if not line.startswith("debugfs ")]
    if ran.returncode or complaints:
        raise RuntimeError(f"debugfs failed: {'; '.join(complaints[:3]) or ran.returncode}")
    return ran.stdout
