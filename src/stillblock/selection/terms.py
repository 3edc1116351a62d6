"""The terms of the rule language: what each is written like, and which bytes it means on a disk.

A new kind of term is a class with `resolve` and an entry in `TERM_KINDS`. Those that need to know
what lies on the disk are in `file_terms.py`.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from stillblock.errors import RuleError, StillblockError
from stillblock.extents import complement, normalise, whole
from stillblock.model import format_size, parse_size
from stillblock.selection.facts import DiskFacts, Match, Phase
from stillblock.selection.file_terms import (
    Free,
    LogicalVolumes,
    Paths,
    Swap,
    WholeFilesystems,
    Zero,
)
from stillblock.selection.partition_table import PartitionTableError, printable
from stillblock.selection.partition_types import KNOWN_TYPES, codes_of
from stillblock.selection.partitions import Partition, PartitionTable
from stillblock.selection.presets import PREFIX

TERM_LENGTH_MAX: Final = 4096
"""Characters in a term: as long as a path may be, which is the longest thing a term will hold."""
_LISTED_MAX: Final = 20
"""Partitions that an error lists; a table can have a thousand."""
_EXAMPLES: Final = (
    "all, free, swap, zero, path:/var/cache/**, fs:LABEL, lv:GROUP/VOLUME, part:2, part:type=swap, "
    "unpartitioned, 64MiB-128MiB, 4GiB+1GiB or 1TiB-"
)


class Meaning(Protocol):
    """A parsed term."""

    def resolve(self, facts: DiskFacts) -> Match:
        """Return the bytes it means; raise `RuleError` if that is nothing or cannot be known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TermKind:
    """One way to designate bytes."""

    name: str
    pattern: re.Pattern[str]
    """What a term of this kind begins like; kinds do not overlap."""
    parse: Callable[[str], Meaning]
    phase: Phase = Phase.INSTANT


def parse_term(text: str) -> tuple[TermKind, Meaning]:
    """Return the kind and meaning of a term; raise `RuleError` that names it if it is malformed."""
    if len(text) > TERM_LENGTH_MAX:
        raise RuleError(
            f"a term has {len(text)} characters, at most {TERM_LENGTH_MAX} are allowed: "
            f"{printable(text[:40])}…"
        )
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RuleError(
            f"{printable(text)} holds bytes that are no UTF-8", hint="write ? in a path for each"
        )
    if text.startswith(PREFIX):
        raise RuleError(
            f"{printable(text)} was not replaced by its terms, as it is when rules are set"
        )
    for kind in TERM_KINDS:
        if kind.pattern.match(text):
            with _NamingTerm(text):
                return kind, kind.parse(text)
    raise RuleError(f"{printable(text)} is not a term", hint=f"write {_EXAMPLES}")


def resolve_term(text: str, facts: DiskFacts) -> tuple[TermKind, Match]:
    """Return the kind of a term and its bytes on a disk; raise `RuleError` that names the term."""
    kind, meaning = parse_term(text)
    with _NamingTerm(text):
        return kind, meaning.resolve(facts)


class _NamingTerm:
    """Puts the term before the message of an error raised inside; keeps its class and hint."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: object, _traceback: object) -> None:
        if isinstance(error, RuleError):
            error_class = (
                PartitionTableError if isinstance(error, PartitionTableError) else RuleError
            )
            raise error_class(
                f"{printable(self._text)}: {error.message}", hint=error.hint
            ) from error


# all ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class All:
    """`all`: the whole disk."""

    def resolve(self, facts: DiskFacts) -> Match:
        """Return `[0, size)`."""
        if facts.size == 0:
            raise RuleError("the disk is empty (0 bytes)")
        return Match(extents=whole(facts.size))


# Byte ranges ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """`START-END`, `START+LENGTH` or `START-`; half-open."""

    start: int
    end: int | None
    """None: to the end of the disk."""

    @classmethod
    def parse(cls, text: str) -> "ByteRange":
        """Return the range; raise `RuleError` if it is malformed or empty."""
        match = re.fullmatch(r"([^-+]+)([-+])([^-+]*)", text)
        if match is None:
            raise RuleError(
                "a byte range is START-END, START+LENGTH, or START- for the rest of the disk"
            )
        first, sign, second = match.groups()
        start = _size(first)
        if sign == "-" and not second.strip():
            return cls(start=start, end=None)
        amount = _size(second)
        end = start + amount if sign == "+" else amount
        if end <= start:
            what = "has no length" if end == start else "ends before it starts"
            raise RuleError(
                f"the range {what} (start {start}, end {end})",
                hint="the end is the first byte that is no longer meant",
            )
        return cls(start=start, end=end)

    def resolve(self, facts: DiskFacts) -> Match:
        """Return the range; raise `RuleError` if it is not wholly on the disk."""
        end = facts.size if self.end is None else self.end
        if self.start >= facts.size or end > facts.size:
            what = "starts" if self.start >= facts.size else "ends"
            where = self.start if self.start >= facts.size else end
            raise RuleError(
                f"the range {what} at byte {where}, but the disk ends at {facts.size} "
                f"({format_size(facts.size)})",
                hint="write START- to reach to the end of the disk",
            )
        return Match(extents=((self.start, end),))


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except StillblockError as error:
        raise RuleError(error.message, hint=error.hint) from error


# Partitions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Partitions:
    """`part:…`: the partitions that something holds for."""

    what: str
    """For errors: `partition 9`, `partition named "data"`."""
    is_meant: Callable[[Partition], bool]

    @classmethod
    def parse(cls, text: str) -> "Partitions":
        """Return the matcher; raise `RuleError` if it is malformed."""
        key, equals, value = text.removeprefix("part:").partition("=")
        if not equals:
            return cls._by_number(key)
        if not value:
            raise RuleError(f"nothing stands after part:{key}=")
        match key:
            case "name":
                return cls(
                    what=f"partition named {printable(value)}",
                    is_meant=lambda partition: partition.name == value,
                )
            case "type":
                return cls._by_type(value)
            case "uuid":
                return cls._by_uuid(value)
            case _:
                raise RuleError(
                    f"part: does not know {printable(key)}",
                    hint="write part:2, part:name=…, part:type=… or part:uuid=…",
                )

    @classmethod
    def _by_number(cls, value: str) -> "Partitions":
        if not re.fullmatch(r"[1-9][0-9]{0,3}", value):
            raise RuleError(
                f"{printable(value)} is no partition number",
                hint="write part:2, part:name=…, part:type=… or part:uuid=…",
            )
        number = int(value)
        return cls(
            what=f"partition {number}", is_meant=lambda partition: partition.number == number
        )

    @classmethod
    def _by_type(cls, value: str) -> "Partitions":
        lowered = value.lower()
        codes = codes_of(lowered)
        if not codes and re.fullmatch(r"0x[0-9a-f]{1,2}", lowered):
            codes = frozenset({f"0x{int(lowered, 16):02x}"})
        if not codes and _GUID.fullmatch(lowered):
            codes = frozenset({lowered})
        if not codes:
            raise RuleError(
                f"{printable(value)} is no known type",
                hint=f"write one of {', '.join(sorted(KNOWN_TYPES))}, or 0x82, or a GUID",
            )
        return cls(
            what=f"partition of type {lowered}", is_meant=lambda partition: partition.type in codes
        )

    @classmethod
    def _by_uuid(cls, value: str) -> "Partitions":
        lowered = value.lower()
        if not _GUID.fullmatch(lowered) and not _MBR_UUID.fullmatch(lowered):
            raise RuleError(
                f"{printable(value)} is no partition uuid",
                hint="write a GUID (GPT), or disk signature and number as in 90a1b2c3-02 (MBR)",
            )
        return cls(
            what=f"partition with uuid {lowered}",
            is_meant=lambda partition: partition.uuid == lowered,
        )

    def resolve(self, facts: DiskFacts) -> Match:
        """Return all partitions it is true of; raise `RuleError` if there is none."""
        table = facts.table()
        meant = [partition for partition in table.partitions if self.is_meant(partition)]
        if not meant:
            raise RuleError(
                f"there is no {self.what} in the disk's {table.kind} table", hint=_those_of(table)
            )
        notes = []
        if len(meant) > 1:
            notes.append("means " + _list(meant))
        if any(partition.is_container for partition in meant):
            inside = [partition for partition in table.partitions if "logical" in partition.flags]
            notes.append(
                "an extended partition, whole, with "
                + (_list(inside) if inside else "nothing in it")
            )
        return Match(
            extents=normalise(partition.extent for partition in meant), note="; ".join(notes)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpartitioned:
    """`unpartitioned`: partition tables, gaps and the tail; all that no partition covers."""

    def resolve(self, facts: DiskFacts) -> Match:
        """Return what no partition covers; never empty, for sector 0 is always part of it."""
        table = facts.table()
        return Match(extents=complement(table.covered, size=facts.size))


def _those_of(table: PartitionTable) -> str:
    if not table.partitions:
        return "it has no partitions at all"
    return f"it has {_list(table.partitions)}"


def _list(partitions: Iterable[Partition]) -> str:
    texts = [partition.label for partition in partitions]
    more = len(texts) - _LISTED_MAX
    return ", ".join(texts[:_LISTED_MAX]) + (f" and {more} more" if more > 0 else "")


_GUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MBR_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{2}")

TERM_KINDS: Final = (
    TermKind(name="all", pattern=re.compile(r"all\Z"), parse=lambda _: All()),
    TermKind(
        name="unpartitioned",
        pattern=re.compile(r"unpartitioned\Z"),
        parse=lambda _: Unpartitioned(),
    ),
    TermKind(name="partition", pattern=re.compile(r"part:"), parse=Partitions.parse),
    TermKind(name="volume", pattern=re.compile(r"lv:"), parse=LogicalVolumes.parse),
    TermKind(name="filesystem", pattern=re.compile(r"fs:"), parse=WholeFilesystems.parse),
    TermKind(name="path", pattern=re.compile(r"path:"), parse=Paths.parse, phase=Phase.FROZEN),
    TermKind(
        name="swap", pattern=re.compile(r"swap\Z"), parse=lambda _: Swap(), phase=Phase.FROZEN
    ),
    TermKind(
        name="free", pattern=re.compile(r"free\Z"), parse=lambda _: Free(), phase=Phase.FROZEN
    ),
    TermKind(
        name="zero", pattern=re.compile(r"zero\Z"), parse=lambda _: Zero(), phase=Phase.FROZEN
    ),
    TermKind(name="range", pattern=re.compile(r"[0-9+-]"), parse=ByteRange.parse),
)
