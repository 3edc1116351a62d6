"""Presets: what is shipped, what users add, and what is not one."""

from pathlib import Path

import pytest

from stillblock.errors import RuleError
from stillblock.selection import Presets, Rules, Term, default_rules
from stillblock.selection.globs import Glob, TreeMatcher
from stillblock.selection.terms import parse_term

SHIPPED = ("database", "linux-vm", "minimal", "windows-vm")


def write(directory: Path, name: str, text: str) -> Presets:
    (directory / f"{name}.toml").write_text(text)
    return Presets(directory)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_preset_is_well_formed_and_starts_from_everything(name: str) -> None:
    preset = Presets().find(name)
    rules = Rules.parse([("exclude", f"preset:{name}")])
    assert [(term.action, term.text) for term in rules.terms] == list(preset.terms)
    assert rules.starts_from_all
    assert preset.description
    for _, text in preset.terms:
        parse_term(text)


def test_all_presets_are_listed_with_the_users(tmp_path: Path) -> None:
    assert Presets().names() == SHIPPED
    presets = write(tmp_path, "ours", 'terms = ["exclude free"]')
    assert presets.names() == tuple(sorted((*SHIPPED, "ours")))
    assert Presets(tmp_path / "none").names() == SHIPPED


def test_a_preset_stands_where_it_was_written(tmp_path: Path) -> None:
    text = 'description = "x"\nterms = ["exclude free", "include-low path:/a b", "include swap"]'
    presets = write(tmp_path, "ours", text)
    rules = Rules.parse(
        [("exclude", "part:1"), ("exclude", " preset:ours "), ("include", "part:2")],
        presets=presets,
    )
    assert [str(term) for term in rules.terms] == [
        "exclude part:1",
        "exclude free",
        "include-low path:/a b",
        "include swap",
        "include part:2",
    ]


def test_a_users_preset_takes_the_place_of_a_shipped_one(tmp_path: Path) -> None:
    presets = write(tmp_path, "minimal", 'terms = ["exclude zero"]')
    assert presets.find("minimal").terms == (("exclude", "zero"),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("terms = [", "no TOML"),
        ("", "a description and terms"),
        ("terms = []", "a description and terms"),
        ('terms = "exclude free"', "a description and terms"),
        ('terms = ["exclude free"]\nname = "x"', 'nobody knows "name"'),
        ('terms = ["free"]', '"free" is no term of a preset'),
        ('terms = ["keep free"]', "is no term of a preset"),
        ("terms = [5]", "is no term of a preset"),
        ('terms = ["exclude preset:minimal"]', "holds no other preset"),
    ],
)
def test_a_malformed_preset_is_refused_by_its_path(tmp_path: Path, text: str, reason: str) -> None:
    presets = write(tmp_path, "ours", text)
    with pytest.raises(RuleError) as caught:
        presets.find("ours")
    assert str(caught.value).startswith(f"{tmp_path / 'ours.toml'}: ")
    assert reason in str(caught.value)


def test_a_preset_that_is_no_text_or_too_long_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff")
    (tmp_path / "b.toml").write_bytes(b"#" * (1 << 20) + b"\n")
    (tmp_path / "c.toml").mkdir()
    for name in "abc":
        with pytest.raises(RuleError, match=rf"{name}\.toml"):
            Presets(tmp_path).find(name)


@pytest.mark.parametrize("name", ["", "../etc", "Linux", "nothing", "a.toml", "a/b"])
def test_an_unknown_preset_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(RuleError, match="database, linux-vm, minimal, windows-vm"):
        Rules.parse([("exclude", f"preset:{name}")])


def test_a_preset_cannot_be_included_nor_kept_unexpanded() -> None:
    with pytest.raises(RuleError, match="write exclude preset:minimal"):
        Rules.parse([("include", "preset:minimal")])
    with pytest.raises(RuleError, match="was not replaced"):
        Rules(terms=(Term(include=False, text="preset:minimal"),))


def test_shadow_copies_are_named_as_windows_names_them() -> None:
    """`{GUID}{GUID}`: braces are characters in a glob, and NTFS ignores case."""
    paths = [text.removeprefix("path:") for _, text in Presets().find("windows-vm").terms]
    matcher = TreeMatcher(
        [Glob.parse(path) for path in paths if path.startswith("/")], is_case_sensitive=False
    )
    inside = matcher.enter(matcher.root(), "System Volume Information")
    guid = "{3808876b-c176-4e48-b7ae-04046e6cc752}"
    assert matcher.match(inside, guid) == 0
    assert matcher.match(inside, "{6f0c1b5a-0000-11ee-b0f5-806e6f6e6963}" + guid)
    assert not matcher.match(inside, "tracking.log")


def test_the_default_is_everything_but_free_space_and_swap() -> None:
    assert [str(term) for term in default_rules().terms] == ["exclude free", "exclude swap"]
