"""Options that many commands share, and how their words become values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Group, Parameter, Token

from stillblock.config import Config
from stillblock.errors import UsageError
from stillblock.model import Reference, RuleTerm, check_name, parse_size

COMMON: Final = Group.create_ordered("Common options", sort_key=1000)


@Parameter(name="*", group=COMMON)
@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes."""

    state_dir: Path | None = None
    """The state directory; default: $STILLBLOCK_STATE, else the user's."""

    json: bool = False
    """Print JSON: one document, or one a line for long work."""

    quiet: bool = False
    """Print results only, no remarks and no progress."""

    def config(self) -> Config:
        """Return where things are, with the directories made."""
        config = Config.load(state_dir=self.state_dir)
        config.ensure()
        return config


@Parameter(name="*", group=COMMON)
@dataclass(frozen=True, kw_only=True)
class Change(Common):
    """What every command takes that destroys or copies something."""

    yes: bool = False
    """Do it without asking."""

    dry_run: bool = False
    """Print what would be done, and do nothing."""


def _to_terms(_: type, tokens: Sequence[Token]) -> tuple[RuleTerm, ...]:
    return tuple(
        RuleTerm(
            include=token.keyword not in {"--exclude", "--preset"},
            text=f"preset:{token.value}" if token.keyword == "--preset" else token.value,
            is_low=token.keyword == "--include-low",
        )
        for token in tokens
    )


def _to_size(_: type, tokens: Sequence[Token]) -> int:
    try:
        return parse_size(tokens[0].value)
    except UsageError as error:
        raise ValueError(str(error)) from error


VolumeName = Annotated[str, Parameter(help="The volume.")]
OptionalVolume = Annotated[str | None, Parameter(help="The volume; default: all.")]
SnapshotRef = Annotated[str, Parameter(help="The snapshot, VOL@SNAP.")]
CloneRef = Annotated[str, Parameter(help="The clone, VOL@SNAP+CLONE.")]
BookmarkRef = Annotated[str, Parameter(help="The bookmark, VOL@NAME.")]
Terms = Annotated[
    tuple[RuleTerm, ...],
    Parameter(
        name=("--include", "--exclude", "--include-low", "--preset"),
        converter=_to_terms,
        accepts_keys=False,
        n_tokens=1,
        consume_multiple=False,
        help="A rule term, as often as needed: free, swap, path:/var/cache/**, part:2, lv:vg/home, "
        "fs:LABEL, 64MiB-128MiB, all, and more in docs/rules.md. Order matters: the last that "
        "matches decides. A list that starts with an exclusion starts from all. --include-low: it "
        "matters less, and is given up first when the store is full. --preset NAME stands for its "
        "terms; `rules presets` lists them.",
    ),
]
OnlyTerms = Annotated[
    tuple[str, ...],
    Parameter(
        name="--only",
        help="Only what this term, or preset:NAME, names; as often as needed: part:2.",
    ),
]
SIZE: Final = Parameter(converter=_to_size, n_tokens=1, accepts_keys=False)
Size = Annotated[int, SIZE]


def volume_of(text: str) -> str:
    """Return the volume a `VOL` argument names; raise `UsageError` if it names more."""
    reference = Reference.parse(text)
    if str(reference) != reference.volume:
        raise UsageError(f"{text!r} should be the name of a volume only: {reference.volume}")
    return reference.volume


def snapshot_of(text: str) -> tuple[str, str]:
    """Return (volume, snapshot) of a `VOL@SNAP` argument."""
    reference = Reference.parse(text)
    if reference.snapshot is None:
        raise UsageError(f"{text!r} names no snapshot; write {reference.volume}@SNAP")
    if reference.clone or reference.repository or reference.path:
        raise UsageError(
            f"{text!r} should be a snapshot only: {reference.volume}@{reference.snapshot}"
        )
    return reference.volume, reference.snapshot


def clone_of(text: str) -> tuple[str, str, str]:
    """Return (volume, snapshot, clone) of a `VOL@SNAP+CLONE` argument.

    `VOL@?+CLONE` is a clone whose snapshot is gone.
    """
    head, plus, name = text.partition("@?+")
    if plus:
        return volume_of(head), "?", check_name(name, what="clone")
    reference = Reference.parse(text)
    if reference.snapshot is None or reference.clone is None or reference.path:
        raise UsageError(f"{text!r} names no clone; write {reference.volume}@SNAP+CLONE")
    return reference.volume, reference.snapshot, reference.clone


def only_terms(texts: tuple[str, ...]) -> tuple[RuleTerm, ...]:
    """Return include terms for the words of `--only`."""
    return tuple(RuleTerm(include=True, text=text) for text in texts)
