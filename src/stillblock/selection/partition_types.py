"""Well-known partition types by name: `part:type=swap` means the same on GPT and MBR disks.

The GUIDs are those of the UEFI specification 2.10, table 5-7, the UAPI Group's discoverable
partitions specification and the vendors' published lists; the MBR codes are the common ones that
`sfdisk --list-types` prints too (a test compares). A name stands for exactly the codes below: no
name is wider than it reads, since a type may be used to exclude.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownType:
    """The codes that one name stands for. GUIDs are lower case."""

    guids: tuple[str, ...] = ()
    mbr_codes: tuple[int, ...] = ()


MBR_EXTENDED_CODES: Final = (0x05, 0x0F, 0x85)
MBR_PROTECTIVE_CODE: Final = 0xEE
"""Type of the entry that covers a GPT disk (UEFI 2.10, table 5-4)."""

KNOWN_TYPES: Final[dict[str, KnownType]] = {
    "efi": KnownType(guids=("c12a7328-f81f-11d2-ba4b-00a0c93ec93b",), mbr_codes=(0xEF,)),
    "bios-boot": KnownType(guids=("21686148-6449-6e6f-744e-656564454649",)),
    "swap": KnownType(guids=("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f",), mbr_codes=(0x82,)),
    "linux": KnownType(guids=("0fc63daf-8483-4772-8e79-3d69d8477de4",), mbr_codes=(0x83,)),
    "linux-root": KnownType(
        guids=(
            "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",  # x86-64
            "44479540-f297-41b2-9af7-d131d5f0458a",  # x86
            "b921b045-1df0-41c3-af44-4c6f280d3fae",  # ARM-64
            "69dad710-2ce4-4e3c-b16c-21a1d49abed3",  # ARM
            "72ec70a6-cf74-40e6-bd49-4bda08e8f224",  # RISC-V-64
        )
    ),
    "linux-usr": KnownType(
        guids=(
            "8484680c-9521-48c6-9c11-b0720656f69e",  # x86-64
            "75250d76-8cc6-458e-bd66-bd47cc81a812",  # x86
            "b0e01050-ee5f-4390-949a-9101b17104e9",  # ARM-64
            "7d0359a3-02b3-4f0a-865c-654403e70625",  # ARM
            "beaec34b-8442-439b-a40b-984381ed097d",  # RISC-V-64
        )
    ),
    "linux-home": KnownType(guids=("933ac7e1-2eb4-4f13-b844-0e14e2aef915",)),
    "linux-srv": KnownType(guids=("3b8f8425-20e0-4f3b-907f-1a25a76f98e8",)),
    "linux-var": KnownType(guids=("4d21b016-b534-45c2-a9fb-5c16e091fd2d",)),
    "linux-tmp": KnownType(guids=("7ec6f557-3bc5-4aca-b293-16ef5df639d1",)),
    "linux-boot": KnownType(guids=("bc13c2ff-59e6-4262-a352-b275fd6f7172",), mbr_codes=(0xEA,)),
    "lvm": KnownType(guids=("e6d6d379-f507-44c2-a23c-238f2a3df928",), mbr_codes=(0x8E,)),
    "raid": KnownType(guids=("a19d880f-05fc-4d3b-a006-743f0f84911e",), mbr_codes=(0xFD,)),
    "luks": KnownType(guids=("ca7d7ccb-63ed-4c53-861c-1742536059cc",), mbr_codes=(0xE8,)),
    "windows": KnownType(guids=("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7",), mbr_codes=(0x07,)),
    "windows-reserved": KnownType(guids=("e3c9e316-0b5c-4db8-817d-f92df00215ae",)),
    "windows-recovery": KnownType(
        guids=("de94bba4-06d1-4d40-a16a-bfd50179d6ac",), mbr_codes=(0x27,)
    ),
    "fat": KnownType(mbr_codes=(0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E)),
    "apple-hfs": KnownType(guids=("48465300-0000-11aa-aa11-00306543ecac",), mbr_codes=(0xAF,)),
    "apple-apfs": KnownType(guids=("7c3457ef-0000-11aa-aa11-00306543ecac",)),
    "extended": KnownType(mbr_codes=MBR_EXTENDED_CODES),
}


def mbr_type(code: int) -> str:
    """Return how a table spells an MBR code: `0x83`."""
    return f"0x{code:02x}"


def codes_of(name: str) -> frozenset[str]:
    """Return every spelling in a table that a known name stands for; empty for an unknown name."""
    known = KNOWN_TYPES.get(name)
    if known is None:
        return frozenset()
    return frozenset(known.guids) | {mbr_type(code) for code in known.mbr_codes}


def name_of(code: str) -> str:
    """Return the known name of a table's type, or an empty string."""
    return _NAME_BY_CODE.get(code, "")


_NAME_BY_CODE: Final = {code: name for name in KNOWN_TYPES for code in codes_of(name)}
