"""The demo's act about rules: what a snapshot leaves out that was told so in words."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from stillblock.demo import edits
from stillblock.demo.disk import Partition
from stillblock.demo.narration import Narrator, sized
from stillblock.demo.nbd_client import NbdClient
from stillblock.demo.session import DemoFailed, Session

SNAPSHOT: Final = "web@words"
FOLDER: Final = "/asyncio"
RULES: Final = ("free", "swap", f"path:{FOLDER}/**")


def tell_words(
    session: Session,
    narrator: Narrator,
    *,
    files: Path,
    filesystem: Partition,
    connect: Callable[[str], NbdClient],
) -> Iterator[tuple[str, str]]:
    """Take a snapshot without free space, swap and one folder; yield what that proves, in words.

    `files` is what the filesystem was filled with, and `connect` takes an export's name. Raise
    `DemoFailed` where something does not hold.
    """
    narrator.step(f"Say it in words: no free space, no swap, nothing of {FOLDER}")
    rules = [word for rule in RULES for word in ("--exclude", rule)]
    for line in session.stillblock("snapshot", "create", SNAPSHOT, *rules).splitlines():
        if line.startswith(("selected", "left out")):
            narrator.output(line)
    image = session.folder / "words.img"
    with connect(SNAPSHOT) as client:
        client.copy_to(image)
    place = edits.image_at(image.name, filesystem)
    session.shell(["e2fsck", "-fn", place])
    yield "e2fsck finds no fault with what was kept", ""
    kept = left_out = 0
    for name, found in _dumped(session.folder, place, files):
        original = (files / name[1:]).read_bytes()
        if name.startswith(f"{FOLDER}/"):
            left_out += len(found)
            if found != bytes(len(original)):
                raise DemoFailed(f"{name} was left out of {SNAPSHOT}, and has content there")
        else:
            kept += len(found)
            if found != original:
                raise DemoFailed(f"{name} was not left out of {SNAPSHOT}, and is not itself there")
    if not kept or not left_out:
        raise DemoFailed("the rules met no file: nothing was proved")
    yield "every other file in it is itself", sized(kept)
    yield f"those of {FOLDER} have their sizes, and read as zeros", sized(left_out)


def _dumped(folder: Path, place: str, files: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of every file, as debugfs reads them from an image."""
    target = folder / "words"
    target.mkdir()
    names = [f"/{path.relative_to(files)}" for path in sorted(files.rglob("*")) if path.is_file()]
    edits.run_debugfs(
        [f"dump {name} {target / str(number)}" for number, name in enumerate(names)],
        image=str(folder / place),
        may_write=False,
        script_file=folder / "words.debugfs",
    )
    for number, name in enumerate(names):
        yield name, (target / str(number)).read_bytes()
