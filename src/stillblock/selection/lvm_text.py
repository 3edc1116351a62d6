"""The text in which LVM2 describes a volume group, read into plain values.

Written from the format as `vgcfgbackup` shows it: `name = value`, `name { … }`, `#` comments; a
value is a number, a quoted string or a list of values. Anything else is an error. Runs in a worker:
the text is a stranger's, and long.
"""

import re
from typing import Final, TypeAlias

from stillblock.errors import StillblockError

TEXT_BYTES_MAX: Final = 2 << 20
"""A volume group of ten thousand segments takes so much."""
DEPTH_MAX: Final = 16
"""Sections in one another; LVM2 itself uses four."""

Value: TypeAlias = "int | str | list[int | str]"
Section: TypeAlias = "dict[str, Value | Section]"

_TOKEN: Final = re.compile(
    r"""(?:\s|\#[^\n]*+)*+(?:
    (?P<string>"(?:[^"\\]|\\.)*+") |
    (?P<word>[A-Za-z0-9_.+-]++) |
    (?P<sign>[={}\[\],]) |
    (?P<end>\0*+\Z)
    )""",
    re.VERBOSE | re.DOTALL,
)

_NUMBER: Final = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?")


class LvmTextError(StillblockError):
    """The text is not of the form that LVM2 writes."""

    code = "lvm_text"


def parse_lvm_text(text: str) -> Section:
    """Return the sections and values; raise `LvmTextError` at the first thing out of place."""
    if len(text) > TEXT_BYTES_MAX:
        raise LvmTextError(f"the LVM2 metadata has {len(text)} characters")
    top: Section = {}
    sections = [top]
    tokens = _Tokens(text)
    while True:
        kind, word = tokens.take()
        if kind == "end":
            if len(sections) > 1:
                raise LvmTextError("the LVM2 metadata ends inside a section")
            return top
        if word == "}" and kind == "sign" and len(sections) > 1:
            sections.pop()
            continue
        if kind != "word" or word in sections[-1]:
            raise tokens.error(f"{word!r:.40} where a new name should be")
        kind, sign = tokens.take()
        if kind == "sign" and sign == "{" and len(sections) <= DEPTH_MAX:
            inner: Section = {}
            sections[-1][word] = inner
            sections.append(inner)
        elif kind == "sign" and sign == "=":
            sections[-1][word] = _value(tokens)
        else:
            raise tokens.error(f"{sign!r:.40} behind {word!r:.40}")


class _Tokens:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def take(self) -> tuple[str, str]:
        """Return the next token's kind and text."""
        match = _TOKEN.match(self._text, self._position)
        if match is None or match.lastgroup is None:
            raise self.error("a sign that does not belong")
        self._position = match.end()
        return match.lastgroup, match[match.lastgroup]

    def error(self, what: str) -> LvmTextError:
        """Return the error that says what is wrong here."""
        return LvmTextError(f"the LVM2 metadata has {what} before character {self._position}")


def _value(tokens: _Tokens) -> Value:
    kind, word = tokens.take()
    if (kind, word) != ("sign", "["):
        return _scalar(kind, word, tokens)
    items: list[int | str] = []
    while True:
        kind, word = tokens.take()
        if (kind, word) == ("sign", "]"):
            return items
        items.append(_scalar(kind, word, tokens))
        kind, word = tokens.take()
        if (kind, word) == ("sign", "]"):
            return items
        if (kind, word) != ("sign", ","):
            raise tokens.error(f"{word!r:.40} in a list")


def _scalar(kind: str, word: str, tokens: _Tokens) -> int | str:
    if kind == "string":
        return re.sub(r"\\(.)", r"\1", word[1:-1], flags=re.DOTALL)
    # Nothing that we use is a fraction; one is kept as it is written.
    if kind == "word" and _NUMBER.fullmatch(word):
        return int(word) if "." not in word else word
    raise tokens.error(f"{word!r:.40} where a value should be")
