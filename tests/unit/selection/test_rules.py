"""Rules and terms: the language, and what is refused before any disk is looked at."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillblock.errors import RuleError, UnsupportedVersionError
from stillblock.selection import Rules, Term
from stillblock.selection.rules import TERM_COUNT_MAX
from stillblock.selection.terms import TERM_LENGTH_MAX

GOOD = [
    "all",
    "unpartitioned",
    "0-1",
    "64MiB-128MiB",
    "4GiB+1GiB",
    "2048s+512s",
    "1TiB-",
    "0-",
    "part:2",
    "part:128",
    "part:name=data",
    "part:name=a=b c",
    "part:type=swap",
    "part:type=SWAP",
    "part:type=0x7",
    "part:type=0657FD6D-A4AB-43C4-84E5-0933C84B4F4F",
    "part:uuid=90A1B2C3-02",
    "part:uuid=0657fd6d-a4ab-43c4-84e5-0933c84b4f4f",
    "free",
    "swap",
    "zero",
    "path:/",
    "path:/etc/",
    "path:/var/cache/**",
    "path:/**/*.tmp",
    "path:data:/a b/[!x-z]?*",
    "path:vg/root:/tmp",
    "path:/a\\[b",
    "fs:data",
    "fs:2",
    "lv:vg/root",
]

BAD = {
    "": "is not a term",
    "everything": "is not a term",
    "ALL": "is not a term",
    "path:": "is no path",
    "path:etc": "is no path",
    "path::/etc": "is no path",
    "path:/a//b": "two slashes",
    "path:/a/../b": ".. is no name",
    "path:/a/./b": ". is no name",
    "path:/a\\": "a backslash stands at the end",
    "path:/a\\/b": "cannot hold a slash",
    "path:/[ab": "no ] behind it",
    "path:/[z-a]": "runs backwards",
    "fs:": "nothing stands after fs:",
    "lv:root": "GROUP/VOLUME",
    "lv:a/b/c": "GROUP/VOLUME",
    "swapfile": "is not a term",
    "free ": "is not a term",
    "part": "is not a term",
    "allx": "is not a term",
    "all\n": "is not a term",
    "1MiB": "a byte range is START-END",
    "-5": "a byte range is START-END",
    "1-2-3": "a byte range is START-END",
    "1+": "is not a size",
    "5parsecs-": "is not a size",
    "5-5": "has no length",
    "5+0": "has no length",
    "10-5": "ends before it starts",
    "1-99999999999999999999": "larger than any disk",
    "part:": "no partition number",
    "part:0": "no partition number",
    "part:-1": "no partition number",
    "part:2-4": "no partition number",
    "part:99999": "no partition number",
    "part:name=": "nothing stands after part:name=",
    "part:label=x": "does not know",
    "part:type=swop": "no known type",
    "part:type=0x123": "no known type",
    "part:uuid=nonsense": "no partition uuid",
    "x" * (TERM_LENGTH_MAX + 1): "at most 4096",
}


@pytest.mark.parametrize("text", GOOD)
def test_a_well_formed_term_is_kept_as_it_was_written(text: str) -> None:
    rules = Rules.parse([("include", f" {text} ")])
    assert rules.terms == (Term(include=True, text=text),)


@pytest.mark.parametrize(("text", "reason"), BAD.items(), ids=[f"{t:.20}" for t in BAD])
def test_a_malformed_term_is_refused_at_once_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        Rules(terms=(Term(include=True, text="all"), Term(include=False, text=text)))
    assert reason in str(caught.value)
    assert text[:20] in str(caught.value).replace("\\n", "\n")


def test_bytes_that_no_name_or_no_text_has_are_refused() -> None:
    with pytest.raises(RuleError, match="cannot hold a NUL"):
        Rules.parse([("exclude", "path:/a\0b")])
    with pytest.raises(RuleError, match=r"bytes that are no UTF-8; write \?"):
        Rules.parse([("exclude", "path:/a\udcff")])


def test_an_unknown_type_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RuleError, match=r"bios-boot, efi, extended, .*swap.* or 0x82, or a GUID"):
        Rules.parse([("exclude", "part:type=swop")])


def test_a_term_cannot_act_on_the_terminal_through_its_error() -> None:
    with pytest.raises(RuleError) as caught:
        Rules.parse([("include", "\x1b[2Jx")])
    assert "\x1b" not in str(caught.value)


@given(st.text(max_size=40) | st.sampled_from([*GOOD, *BAD]).map(lambda t: t[:60]))
def test_any_text_is_a_term_or_a_rule_error(text: str) -> None:
    try:
        rules = Rules.parse([("include", text)])
    except RuleError:
        return
    assert Rules.from_json(json.loads(json.dumps(rules.to_json()))) == rules


@given(st.text("0123456789kMiBs+- ", max_size=20) | st.text("part:namety=0x-", max_size=20))
def test_near_misses_are_terms_or_rule_errors(text: str) -> None:
    try:
        Rules.parse([("exclude", text)])
    except RuleError:
        pass


def test_too_many_terms_are_refused() -> None:
    with pytest.raises(RuleError, match="1001 terms"):
        Rules.parse([("include", "all")] * (TERM_COUNT_MAX + 1))


def test_what_is_neither_include_nor_exclude_is_refused() -> None:
    with pytest.raises(RuleError, match="neither include nor exclude"):
        Rules.parse([("keep", "all")])


def test_terms_of_a_snapshot_stand_behind_the_standing_ones() -> None:
    standing = Rules.parse([("exclude", "part:3")])
    extra = Rules.parse([("include", "0-1MiB")])
    assert [term.text for term in standing.extended(extra).terms] == ["part:3", "0-1MiB"]
    assert standing.extended(Rules()) == standing


def test_rules_survive_json() -> None:
    rules = Rules.parse([("include", "all"), ("exclude", "part:name=Ümläut")])
    document = json.loads(json.dumps(rules.to_json()))
    assert document["version"] == 1
    assert Rules.from_json(document) == rules


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"version": "1", "terms": []},
        {"version": 1},
        {"version": 1, "terms": "all"},
        {"version": 1, "terms": ["all"]},
        {"version": 1, "terms": [{"include": 1, "text": "all"}]},
        {"version": 1, "terms": [{"include": True, "text": 5}]},
        {"version": 1, "terms": [{"include": True, "text": "nonsense"}]},
    ],
)
def test_a_document_that_is_not_rules_is_refused(document: object) -> None:
    with pytest.raises(RuleError):
        Rules.from_json(document)


def test_rules_of_a_newer_release_are_refused_as_such() -> None:
    with pytest.raises(UnsupportedVersionError, match="version 2, this program reads 1"):
        Rules.from_json({"version": 2, "terms": []})
