"""Presets: lists of terms by name, shipped and the user's own.

A preset is a TOML file: a description, and terms in order, each with its action:

    description = "A Linux system without what it makes anew"
    terms = ["exclude swap", "exclude path:/var/cache", "include path:/var/cache/apt/archives"]

`exclude preset:NAME` stands for its terms, and is replaced by them when rules are set: rules that
stand do not change when a preset does.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

from stillblock.errors import RuleError
from stillblock.selection.partition_table import printable

PREFIX: Final = "preset:"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_FILE_BYTES_MAX: Final = 1 << 20
"""A thousand terms of a line each take a tenth of it."""
ACTIONS: Final = ("include", "include-low", "exclude")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A named list of terms, each with its action."""

    name: str
    description: str
    terms: tuple[tuple[str, str], ...]


class Presets:
    """The presets there are: the user's, and behind them those that are shipped."""

    def __init__(self, user_directory: Path | None = None) -> None:
        self._user_directory = user_directory

    def find(self, name: str) -> Preset:
        """Return a preset; raise `RuleError` if there is none of that name or it is malformed."""
        if not _NAME.fullmatch(name):
            raise RuleError(f"{printable(name)} is no name of a preset", hint=self._choice())
        for source, text in self._texts(f"{name}.toml"):
            return _parsed(name, text, source=source)
        raise RuleError(f"there is no preset {name}", hint=self._choice())

    def names(self) -> tuple[str, ...]:
        """Return the names of all presets, sorted."""
        found = {entry.name for entry in files(__name__).iterdir()}
        if self._user_directory is not None and self._user_directory.is_dir():
            found |= {path.name for path in self._user_directory.iterdir()}
        names = (name.removesuffix(".toml") for name in found if name.endswith(".toml"))
        return tuple(sorted(name for name in names if _NAME.fullmatch(name)))

    def expanded(self, pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        """Return (action, term) pairs with each `exclude preset:NAME` replaced by its terms."""
        result: list[tuple[str, str]] = []
        for action, text in pairs:
            term = text.strip()
            if not term.startswith(PREFIX):
                result.append((action, text))
                continue
            if action != "exclude":
                raise RuleError(
                    f"{printable(term)}: a preset says itself what it includes",
                    hint=f"write exclude {term}",
                )
            result += self.find(term.removeprefix(PREFIX)).terms
        return tuple(result)

    def _texts(self, file_name: str) -> Iterator[tuple[str, str]]:
        """Yield where a preset of that file name is, and what it holds; the user's first."""
        if self._user_directory is not None:
            path = self._user_directory / file_name
            try:
                with path.open("rb") as file:
                    data = file.read(_FILE_BYTES_MAX + 1)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise RuleError(f"{path}: cannot be read: {error.strerror}") from error
            else:
                yield str(path), _text(data, source=str(path))
        shipped = files(__name__) / file_name
        if shipped.is_file():
            yield file_name, shipped.read_text(encoding="utf-8")

    def _choice(self) -> str:
        return f"the presets are {', '.join(self.names())}"


def _text(data: bytes, *, source: str) -> str:
    if len(data) > _FILE_BYTES_MAX:
        raise RuleError(f"{source}: a preset has at most {_FILE_BYTES_MAX} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RuleError(f"{source}: this is no UTF-8 text") from error


def _parsed(name: str, text: str, *, source: str) -> Preset:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RuleError(f"{source}: this is no TOML: {error}") from error
    unknown = sorted(document.keys() - {"description", "terms"})
    description, terms = document.get("description", ""), document.get("terms")
    if unknown or not isinstance(description, str) or not isinstance(terms, list) or not terms:
        what = f"nobody knows {printable(unknown[0])}" if unknown else "that is not so here"
        raise RuleError(
            f"{source}: a preset has a description and terms, a list of strings; {what}"
        )
    return Preset(
        name=name,
        description=description,
        terms=tuple(_pair(term, source=source) for term in terms),
    )


def _pair(term: object, *, source: str) -> tuple[str, str]:
    if isinstance(term, str):
        action, _, text = term.strip().partition(" ")
        if action in ACTIONS and text.strip() and not text.strip().startswith(PREFIX):
            return action, text.strip()
    raise RuleError(
        f"{source}: {printable(str(term)[:80])} is no term of a preset",
        hint='write "exclude TERM" or "include TERM"; a preset holds no other preset',
    )
