"""Rules: the ordered include and exclude terms by which a user says which blocks matter."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from stillblock.errors import RuleError, UnsupportedVersionError
from stillblock.model import RuleTerm
from stillblock.selection.presets import ACTIONS, Presets
from stillblock.selection.terms import parse_term

RULES_VERSION: Final = 1
TERM_COUNT_MAX: Final = 1000
"""Terms in a list: more than a person writes, few enough that resolving stays cheap."""

Term = RuleTerm
"""One include or exclude term; the model's, since volumes and snapshots record it too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Terms in order; the last one that matches a byte decides it. Always well-formed.

    Bytes that no term matches are selected if the list is empty or starts with an exclusion, and
    left out if it starts with an inclusion.
    """

    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        """Raise `RuleError` that names the first malformed term."""
        if len(self.terms) > TERM_COUNT_MAX:
            raise RuleError(
                f"there are {len(self.terms)} terms; at most {TERM_COUNT_MAX} are allowed"
            )
        for term in self.terms:
            parse_term(term.text)

    @classmethod
    def parse(cls, pairs: Iterable[tuple[str, str]], *, presets: Presets | None = None) -> "Rules":
        """Return the rules for (action, term) pairs, in the user's order.

        An action is "include", "exclude" or "include-low". Presets are replaced by their terms:
        what is kept of rules are always the terms of the result.
        """
        terms = []
        for action, text in (presets or Presets()).expanded(pairs):
            if action not in ACTIONS:
                raise RuleError(f"{action!r} is neither include nor exclude (term {text!r})")
            is_low = action == "include-low"
            terms.append(Term(include=action != "exclude", text=text.strip(), is_low=is_low))
        return cls(terms=tuple(terms))

    @property
    def starts_from_all(self) -> bool:
        """Whether bytes that no term matches are selected."""
        return not self.terms or not self.terms[0].include

    def extended(self, extra: "Rules") -> "Rules":
        """Return standing rules with the terms of one snapshot behind them, which so win.

        What the combined list starts with decides what it starts from.
        """
        return Rules(terms=self.terms + extra.terms)

    def to_json(self) -> dict[str, object]:
        """Return a document that `from_json` reads back."""
        return {
            "version": RULES_VERSION,
            "terms": [
                {"include": term.include, "text": term.text}
                | ({"is_low": True} if term.is_low else {})
                for term in self.terms
            ],
        }

    @classmethod
    def from_json(cls, document: object) -> "Rules":
        """Return the rules in a document; raise `RuleError` if it is none, whatever it holds.

        Raise `UnsupportedVersionError` if a newer release wrote it.
        """
        if not isinstance(document, dict) or not isinstance(document.get("version"), int):
            raise RuleError(f"this is no rules document: {document!r:.80}")
        if document["version"] != RULES_VERSION:
            raise UnsupportedVersionError(
                f"the rules have version {document['version']}, this program reads {RULES_VERSION}",
                hint="use the release that wrote them, or a newer one",
            )
        terms = document.get("terms")
        if not isinstance(terms, list):
            raise RuleError(f"a rules document has a list of terms, not {terms!r:.80}")
        return cls(terms=tuple(_term_from_json(term) for term in terms))


def default_rules() -> Rules:
    """Return what holds where nobody said anything: everything but free space and swap."""
    return Rules.parse([("exclude", "free"), ("exclude", "swap")])


def _term_from_json(document: object) -> Term:
    if isinstance(document, dict):
        include, text = document.get("include"), document.get("text")
        is_low = document.get("is_low", False)
        if isinstance(include, bool) and isinstance(text, str) and isinstance(is_low, bool):
            return Term(include=include, text=text, is_low=is_low and include)
    raise RuleError(f"a term in a rules document has include and text, not {document!r:.80}")
