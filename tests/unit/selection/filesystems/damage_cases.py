"""Thousands of small damages to a filesystem's structures, and what no reader may say then.

A reader may refuse (`UnresolvedError`), for one file or for all. What it does say is judged against
the undamaged filesystem: nothing may be free that was a file's or metadata, and what would be left
out with a file may not have been another's.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from stillblock.extents import intersect, normalise, subtract, union
from stillblock.model import Extents
from stillblock.selection.filesystems import (
    FileKind,
    UnresolvedError,
    open_filesystem,
    walk,
)
from unit.selection.filesystems.reading import places

READ_BYTES_MAX = 256 << 20
"""A reader that asks for more than this of a disk of some MiB does not end by itself."""


class DamagedDisk:
    """An image with other bytes in some places, which counts what is read."""

    def __init__(self, content: bytes, damages: Mapping[int, bytes] = MappingProxyType({})) -> None:
        self._content = content
        self._damages = sorted(damages.items())
        self._read_bytes = 0
        self.size = len(content)

    def pread(self, *, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size, "a reader asks for what is there"
        self._read_bytes += length
        assert self._read_bytes < READ_BYTES_MAX, "a reader does not end"
        data = self._content[offset : offset + length]
        for place, damage in self._damages:
            begin, end = max(place, offset), min(place + len(damage), offset + length)
            if begin < end:
                data = b"".join(
                    (
                        data[: begin - offset],
                        damage[begin - place : end - place],
                        data[end - offset :],
                    )
                )
        return data


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a reader says of a filesystem."""

    data: dict[str, Extents | None]
    """Where the data of each path lies; None where it is unresolved."""
    numbers: dict[str, int]
    fixed: Extents
    free: Extents

    @property
    def all_data(self) -> Extents:
        return normalise(e for extents in self.data.values() for e in extents or ())

    def left_out_with(self, path: str) -> Extents:
        """What may be left out if a term matches this path only: nobody else claims it."""
        own = self.data[path] or ()
        for other, extents in self.data.items():
            if self.numbers[other] != self.numbers[path]:
                own = subtract(own, extents or ())
        return subtract(own, self.fixed)

    @property
    def left_out_as_free(self) -> Extents:
        return subtract(subtract(self.free, self.all_data), self.fixed)


def see(disk: DamagedDisk) -> Sight:
    """Ask a reader everything."""
    filesystem = open_filesystem(disk)
    data: dict[str, Extents | None] = {}
    numbers: dict[str, int] = {}
    for path, node in walk(filesystem):
        if node.kind is not FileKind.REGULAR:
            continue
        numbers[path] = node.number
        try:
            runs = filesystem.runs(node)
        except UnresolvedError:
            data[path] = None
        else:
            data[path] = places(runs)
    return Sight(data=data, numbers=numbers, fixed=filesystem.fixed(), free=filesystem.free())


def damages(content: bytes, places: Extents, chance: random.Random) -> Iterable[tuple[int, bytes]]:
    """Flip bits, put in numbers, and put one structure's bytes into another, without end."""
    offsets = [offset for start, end in places for offset in range(start, end)]
    # Most of a structure is zeros, where most damage is harmless: half hits what says something.
    telling = [offset for offset in offsets if content[offset]]
    while True:
        at = chance.choice(chance.choice((offsets, telling)))
        match chance.randrange(5):
            case 0 | 1:
                damage = bytes([content[at] ^ 1 << chance.randrange(8)])
            case 2:
                damage = bytes([chance.randrange(256)])
            case 3:
                number = chance.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, chance.getrandbits(32)))
                damage = number.to_bytes(4, "little")
            case _:
                other = chance.choice(telling)
                damage = content[other : other + 8]
        damage = damage[: len(content) - at]
        if content[at : at + len(damage)] != damage:
            yield at, damage


@dataclass(frozen=True, kw_only=True)
class Damageable:
    """An image and where its structures lie."""

    content: bytes
    places: Extents
    is_invisible: Callable[[str, Sight], bool] = lambda path, sound: False
    """Whether nobody can tell that a path is the work of damage."""


def check_damages(image: Damageable, *, seed: int, count: int) -> int:
    """Damage an image `count` times; return how often the reader still said something."""
    content = image.content
    sound = see(DamagedDisk(content))
    kept = union(sound.all_data, sound.fixed)
    chance = random.Random(seed)
    seen = 0
    tried = damages(content, image.places, chance)
    for index, (at, damage) in zip(range(count), tried, strict=False):
        case = f"seed {seed}, case {index}: {damage.hex()} at {at:#x}"
        try:
            sight = see(DamagedDisk(content, {at: damage}))
        except UnresolvedError:
            continue
        except Exception as error:
            raise AssertionError(f"{case}: {error!r}") from error
        seen += 1
        assert intersect(sight.left_out_as_free, kept) == (), case
        for path in sight.data:
            if image.is_invisible(path, sound):
                continue
            others = normalise(
                e
                for other, extents in sound.data.items()
                if sound.numbers[other] != sound.numbers.get(path)
                for e in extents or ()
            )
            lost = intersect(sight.left_out_with(path), union(others, sound.fixed))
            assert lost == (), f"{case}: {path!r} would take {lost} with it"
    return seen
