"""The values a partition table parser returns, and the checks that hold for every kind of table."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from stillblock.errors import Blame, ExitCode, RuleError
from stillblock.extents import normalise
from stillblock.model import Extents, format_size
from stillblock.selection.partition_types import name_of


class PartitionTableError(RuleError):
    """The disk's partition table is damaged or contradicts itself: no term may rely on it."""

    code: ClassVar[str] = "partition_table"
    exit_code: ClassVar[ExitCode] = ExitCode.FAILED
    blame: ClassVar[Blame] = Blame.DISK


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition; `start` and `end` are bytes, half-open."""

    number: int
    """As Linux counts: slot + 1, logical partitions from 5."""
    start: int
    end: int
    type: str
    """`0x83` on MBR, a lower-case GUID on GPT."""
    name: str = ""
    """Only GPT has names."""
    uuid: str = ""
    """GPT: the unique GUID, lower case. MBR: `signature-NN` in hex, as in Linux' PARTUUID."""
    flags: tuple[str, ...] = ()
    """`active`, `logical`, `extended` (MBR); `required`, `no-block-io`, `legacy-boot` (GPT)."""

    @property
    def is_container(self) -> bool:
        """Whether it is an extended partition, which holds others and no data of its own."""
        return "extended" in self.flags

    @property
    def extent(self) -> tuple[int, int]:
        """Where it lies."""
        return self.start, self.end

    @property
    def label(self) -> str:
        """How errors and notes name it: `part:2 "data" linux 10 GiB`."""
        words = [
            f"part:{self.number}",
            printable(self.name) if self.name else "",
            name_of(self.type) or self.type,
            format_size(self.end - self.start),
        ]
        return " ".join(word for word in words if word)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionTable:
    """What a disk's table says, checked: partitions lie on the disk and do not overlap."""

    kind: Literal["gpt", "mbr"]
    sector_size: int
    disk_id: str
    """GPT disk GUID, or the MBR disk signature in hex; empty where there is none."""
    partitions: tuple[Partition, ...]
    notes: tuple[str, ...] = ()
    """What a careful user should know, such as that the backup header was used."""

    @property
    def covered(self) -> Extents:
        """The bytes that a partition covers. An extended partition covers only by its logical ones,
        so that the tables between them count as unpartitioned.
        """
        return normalise(p.extent for p in self.partitions if not p.is_container)


def printable(text: str) -> str:
    """Return text from a disk or a user quoted, with nothing in it that a terminal would act on."""
    return '"' + "".join(c if c.isprintable() and c != '"' else _escape(c) for c in text) + '"'


def refuse_past_end(partition: Partition, *, disk_size: int) -> None:
    """Raise if a partition is not wholly on the disk."""
    if partition.end > disk_size:
        raise PartitionTableError(
            f"{partition.label} ends at byte {partition.end}, past the end of the disk "
            f"({disk_size} bytes, {format_size(disk_size)}): the image is cut short or the table "
            "belongs to a larger disk",
            hint="restore the missing end, or correct the table, or say what to keep in bytes",
        )


def refuse_overlaps(partitions: tuple[Partition, ...]) -> None:
    """Raise if two partitions share a byte: excluding one would leave out part of the other."""
    ordered = sorted(partitions, key=lambda p: p.extent)
    for before, after in pairwise(ordered):
        if after.start < before.end:
            raise PartitionTableError(
                f"{before.label} and {after.label} overlap by "
                f"{format_size(min(before.end, after.end) - after.start)}",
                hint="correct the table, or say what to keep in bytes",
            )


def _escape(character: str) -> str:
    if character == '"':
        return '\\"'
    return character.encode("unicode_escape").decode("ascii")
