"""Path globs: read from a term, and matched by the thousand while a tree is walked.

A glob is matched name by name, from the top: a directory carries the set of places that globs have
come to (a lazy automaton, kept by set), so that a subtree which no glob can enter costs nothing and
a name is compared only with what may stand at its depth. No path is ever matched from its
beginning.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from stillblock.errors import RuleError

_STATES_MAX: Final = 10_000
"""Sets of places that are kept; more than globs of people ever come to. Then they are made anew."""


@dataclass(frozen=True, slots=True)
class Anything:
    """`**` between slashes: any number of directories, also none."""


@dataclass(frozen=True, slots=True)
class Literal:
    """A name as it is."""

    name: str


@dataclass(frozen=True, slots=True)
class Pattern:
    """A name with `*`, `?` or `[…]`."""

    tokens: tuple[str, ...]
    """`_STAR`; or `_LITERAL` and a character; or `_ONE` and a regular expression for one."""


Component = Anything | Literal | Pattern
_STAR: Final = "*"
_LITERAL: Final = "="
_ONE: Final = "1"


@dataclass(frozen=True, slots=True)
class Glob:
    """A path with wildcards. One that ends at a directory means everything in it."""

    text: str
    components: tuple[Component, ...] = field(compare=False)

    @classmethod
    def parse(cls, text: str) -> "Glob":
        """Return the glob; raise `RuleError` if it is malformed or can match nothing."""
        if not text.startswith("/"):
            raise RuleError("a path begins with /", hint="write path:/var/cache or path:/**/*.tmp")
        parts = _split(text[1:])
        if parts and not parts[-1]:
            parts.pop()  # a slash at the end
        components = tuple(_component(part) for part in parts)
        return cls(text, components)


def _split(text: str) -> list[str]:
    """Split at slashes; a backslash keeps the next character from being special."""
    parts = [""]
    escaped = False
    for character in text:
        if character == "/" and not escaped:
            parts.append("")
            continue
        if character == "/":
            raise RuleError("a name cannot hold a slash, not even an escaped one")
        parts[-1] += character
        escaped = character == "\\" and not escaped
    if escaped:
        raise RuleError("a backslash stands at the end", hint=r"write \\ for a backslash")
    return parts


def _component(part: str) -> Component:
    if part == "**":
        return Anything()
    if not part:
        raise RuleError("two slashes stand side by side", hint="write ** for any directories")
    if part in (".", ".."):
        raise RuleError(f"{part} is no name in a path", hint="write the path from the top")
    tokens: list[str] = []
    characters = iter(part)
    for character in characters:
        match character:
            case "\\":
                tokens.append(_literal(next(characters)))
            case "*":
                if tokens[-1:] != [_STAR]:
                    tokens.append(_STAR)
            case "?":
                tokens.append(_ONE + ".")
            case "[":
                tokens.append(_ONE + _class(characters))
            case _:
                tokens.append(_literal(character))
    if all(token.startswith(_LITERAL) for token in tokens):
        return Literal("".join(token[1:] for token in tokens))
    return Pattern(tuple(tokens))


def _literal(character: str) -> str:
    if character == "\0":
        raise RuleError("a name cannot hold a NUL")
    return _LITERAL + character


def _class(rest: Iterator[str]) -> str:
    """Return the regular expression of a `[…]`, whose bracket was read, and read to its end."""
    items: list[tuple[str, str]] = []
    first = next(rest, "")
    is_negated = first in ("!", "^")
    character = next(rest, "") if is_negated else first
    is_first = True
    while character != "]" or is_first:
        is_first = False
        if character == "\\":
            character = next(rest, "")
        if not character:
            raise RuleError("a [ has no ] behind it", hint=r"write \[ for the character itself")
        low = character
        character = next(rest, "")
        if character == "-":
            character = next(rest, "")
            if character == "]":
                items += [(low, low), ("-", "-")]
                break
            if character == "\\":
                character = next(rest, "")
            if not character:
                continue
            if character < low:
                raise RuleError(f"the range {low}-{character} in [ ] runs backwards")
            items.append((low, character))
            character = next(rest, "")
        else:
            items.append((low, low))
    inner = "".join(
        re.escape(low) if low == high else f"{re.escape(low)}-{re.escape(high)}"
        for low, high in items
    )
    return f"[{'^' if is_negated else ''}{inner}]"


# Matching -------------------------------------------------------------------------------------

_Place = tuple[int, int]
"""A glob, and its component that a name may match next."""


@dataclass(slots=True, eq=False)
class Standing:
    """How far the globs have come at one directory, and what names in it are compared with."""

    matched: int
    """Bits of the globs that mean the directory, and so everything below."""
    step: "_Step"


@dataclass(slots=True, eq=False)
class _Step:
    """What names are compared with, for one set of places."""

    always: set[_Place] = field(default_factory=set)
    """Where the globs stand behind any name."""
    matched: int = 0
    """The globs that mean any name."""
    literals: dict[str, tuple[_Place, ...]] = field(default_factory=dict)
    endings: dict[str, tuple[_Place, ...]] = field(default_factory=dict)
    """For `*.tmp` and its like, of which lists of globs are full."""
    ending_lengths: tuple[int, ...] = ()
    tests: list[tuple[Callable[[str], object], _Place]] = field(default_factory=list)
    next: "_Step | None" = None
    """The step below a directory whose name matched nothing in particular."""


class TreeMatcher:
    """Matches many globs at once along a walk; bit *i* of a result stands for glob *i*."""

    def __init__(self, globs: Iterable[Glob], *, is_case_sensitive: bool = True) -> None:
        self._globs = [glob.components for glob in globs]
        self._is_case_sensitive = is_case_sensitive
        self._steps: dict[frozenset[_Place], _Step] = {}

    def root(self) -> Standing:
        """Return where the globs stand at the top directory."""
        matched = 0
        places: set[_Place] = set()
        for index, components in enumerate(self._globs):
            if components:
                places |= self._reached(index, 0)
            else:
                matched |= 1 << index
        return Standing(matched, self._step(places))

    def match(self, directory: Standing, name: str) -> int:
        """Return which globs mean a name in a directory."""
        matched = directory.matched | directory.step.matched
        for index, position in self._hits(directory.step, name):
            if position + 1 == len(self._globs[index]):
                matched |= 1 << index
        return matched

    def enter(self, directory: Standing, name: str) -> Standing:
        """Return where the globs stand in a directory of a directory."""
        step = directory.step
        matched = directory.matched | step.matched
        hits = self._hits(step, name)
        if not hits:
            if step.next is None:
                step.next = self._step(step.always)
            return Standing(matched, step.next)
        places = set(step.always)
        for index, position in hits:
            if position + 1 == len(self._globs[index]):
                matched |= 1 << index
            else:
                places |= self._reached(index, position + 1)
        return Standing(matched, self._step(places))

    def _hits(self, step: _Step, name: str) -> tuple[_Place, ...]:
        """Return the places whose component this name matches."""
        key = name if self._is_case_sensitive else upcase(name)
        hits = step.literals.get(key, ())
        for length in step.ending_lengths:
            hits += step.endings.get(key[-length:], ())
        for test, place in step.tests:
            if test(name):
                hits += (place,)
        return hits

    def _reached(self, index: int, position: int) -> set[_Place]:
        """Return the place and, since `**` may stand for no directory, those right behind it."""
        components = self._globs[index]
        places = {(index, position)}
        while position + 1 < len(components) and isinstance(components[position], Anything):
            position += 1
            places.add((index, position))
        return places

    def _step(self, places: set[_Place]) -> _Step:
        key = frozenset(places)
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= _STATES_MAX:
                self._steps.clear()
            step = self._steps[key] = self._made(sorted(places))
        return step

    def _made(self, places: Iterable[_Place]) -> _Step:
        step = _Step()
        for place in places:
            index, position = place
            match self._globs[index][position]:
                case Anything():
                    # It stays, whatever the name; as the last it means all there is.
                    step.always |= self._reached(index, position)
                    if position + 1 == len(self._globs[index]):
                        step.matched |= 1 << index
                case Literal(name):
                    _append(step.literals, self._folded(name), place)
                case Pattern(tokens):
                    ending = _ending(tokens)
                    if ending:
                        _append(step.endings, self._folded(ending), place)
                    else:
                        flags = re.DOTALL if self._is_case_sensitive else re.DOTALL | re.IGNORECASE
                        step.tests.append((re.compile(expression(tokens), flags).match, place))
        step.ending_lengths = tuple({len(ending) for ending in step.endings})
        return step

    def _folded(self, name: str) -> str:
        return name if self._is_case_sensitive else upcase(name)


def _append(places: dict[str, tuple[_Place, ...]], key: str, place: _Place) -> None:
    places[key] = (*places.get(key, ()), place)


def upcase(name: str) -> str:
    """Return a name as filesystems compare it that ignore case: character by character.

    Never two characters for one, as `str.upper` does: that would match names that differ.
    """
    if name.isascii():
        return name.upper()
    return "".join(c if len(upper := c.upper()) > 1 else upper for c in name)


def expression(tokens: tuple[str, ...]) -> str:
    """Return the regular expression of a name; it takes a time that is linear in the name's length
    for each `*`, for what stands between two of them is found once and never given back.
    """
    groups: list[str] = [""]
    for token in tokens:
        if token == _STAR:
            groups.append("")
        else:
            groups[-1] += re.escape(token[1:]) if token[0] == _LITERAL else token[1:]
    if len(groups) == 1:
        return groups[0] + r"\Z"
    middle = "".join(f"(?>.*?{group})" for group in groups[1:-1])
    # The last group has a fixed length: it ends the name, whatever stands before it.
    return rf"{groups[0]}{middle}.*{groups[-1]}\Z"


def _ending(tokens: tuple[str, ...]) -> str | None:
    """Return the ending that a name with these tokens has, if that is all they say: `*.tmp`."""
    rest = tokens[1:]
    if tokens[0] != _STAR or not all(token[0] == _LITERAL for token in rest):
        return None
    return "".join(token[1:] for token in rest)
