"""Damage to a filesystem's metadata, and what a reader must never make of it.

What a reader may do with a damaged filesystem is to raise `UnresolvedError`, or to be right: what
is left out by the rules of ADR 8 was, before the damage, free or a file's that was meant. Files are
meant by number here: a name that reads differently is another name, and nothing can tell.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stillblock.errors import OriginIOError
from stillblock.extents import complement, intersect, normalise, subtract, total_bytes, union
from stillblock.model import Extent, Extents
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems import FileKind, Filesystem, UnresolvedError, walk
from unit.selection.filesystems.damage_cases import DamagedDisk
from unit.selection.filesystems.reading import data_extents

CPU_SECONDS_MAX = 10
_SECTOR = 512


@dataclass(frozen=True)
class Subject:
    """A sound filesystem and what is true of it."""

    content: bytes
    open: Callable[[Disk], Filesystem]
    free: Extents
    files: Mapping[int, Extents]
    """What each regular file has, by its number."""
    targets: tuple[int, ...]
    """Sectors of metadata with anything in them."""
    blind: Extents
    """Where damage cannot be told from another sound filesystem: it is not damaged there."""


def examine(
    content: bytes, open_filesystem: Callable[[Disk], Filesystem], *, blind: Extents = ()
) -> Subject:
    """Read a sound filesystem."""
    filesystem = open_filesystem(DamagedDisk(content))
    files = {
        node.number: data_extents(filesystem, node)
        for _, node in walk(filesystem)
        if node.kind is FileKind.REGULAR
    }
    free = filesystem.free()
    taken = normalise(extent for extents in files.values() for extent in extents)
    holders = complement(union(free, taken), size=len(content))
    targets = tuple(
        at
        for start, end in holders
        for at in range(start, end, _SECTOR)
        if any(content[at : at + _SECTOR])
    )
    return Subject(content, open_filesystem, free, files, targets, blind)


def mutate(dice: random.Random, subject: Subject) -> dict[int, bytes]:
    """Damage one to three places of a filesystem's metadata."""
    while True:
        patches = dict(_mutation(dice, subject) for _ in range(dice.choice((1, 1, 1, 2, 3))))
        damaged = normalise((place, place + len(patch)) for place, patch in patches.items())
        if not intersect(damaged, subject.blind):
            return patches


def _mutation(dice: random.Random, subject: Subject) -> tuple[int, bytes]:
    content = subject.content
    sector = dice.choice(subject.targets)
    place = sector + dice.randrange(_SECTOR)
    word = sector + dice.randrange(0, _SECTOR, 4)
    match dice.randrange(7):
        case 0 | 1:
            return place, bytes([content[place] ^ 1 << dice.randrange(8)])
        case 2:
            return place, dice.randbytes(1)
        case 3:
            numbers = (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, dice.randrange(1 << 32))
            return word, dice.choice(numbers).to_bytes(4, dice.choice(("little", "big")))
        case 4:
            other = dice.choice(subject.targets) + dice.randrange(0, _SECTOR, 4)
            return word, content[other : other + 4]
        case 5:
            near = int.from_bytes(content[word : word + 4], "little") + dice.choice((-1, 1, 8))
            return word, (near & 0xFFFFFFFF).to_bytes(4, "little")
        case _:
            # A write that was lost, or went somewhere else.
            other = dice.choice((*subject.targets[:50], None))
            return sector, bytes(_SECTOR) if other is None else content[other : other + _SECTOR]


def left_out(filesystem: Filesystem, is_meant: Callable[[int], bool]) -> Extents:
    """What `free` and a term that means some files leave out, by the rules of ADR 8.

    A file whose runs are unknown is kept if it is meant, and makes the terms unresolved if not.
    """
    meant: list[Extent] = []
    unmeant: list[Extent] = []
    for _, node in walk(filesystem):
        if node.kind is not FileKind.REGULAR:
            continue
        found = meant if is_meant(node.number) else unmeant
        try:
            runs = filesystem.runs(node)
        except UnresolvedError:
            if found is unmeant:
                raise
            continue
        filesystem.read(node, offset=0, length=1000)
        found += [(run.start, run.start + run.length) for run in runs if run.start is not None]
    claimed = normalise(unmeant)
    files = subtract(subtract(normalise(meant), claimed), filesystem.fixed())
    return union(files, subtract(subtract(filesystem.free(), claimed), normalise(meant)))


def try_one(seed: int, subject: Subject) -> str:
    """Damage the subject, read it, and return how that ended; fail if it was harmful."""
    dice = random.Random(seed)
    patches = mutate(dice, subject)
    numbers = sorted(subject.files)
    meant = set(dice.sample(numbers, len(numbers) // 2))
    began = time.process_time()
    try:
        filesystem = subject.open(DamagedDisk(subject.content, patches))
        found = left_out(filesystem, meant.__contains__)
    except (UnresolvedError, OriginIOError):
        return "unresolved"
    finally:
        assert time.process_time() - began < CPU_SECONDS_MAX, f"seed {seed}: {patches}: too long"
    allowed = normalise(
        [*subject.free, *(extent for number in meant for extent in subject.files[number])]
    )
    lost = subtract(found, allowed)
    assert not lost, f"seed {seed}: {patches}: {total_bytes(lost)} bytes would be lost: {lost[:3]}"
    return "resolved"
