"""Path globs: what they mean, by a slow matcher that tries everything, and how long they take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillblock.errors import RuleError
from stillblock.selection.globs import Glob, TreeMatcher, upcase


def matches(glob: str, path: str, *, is_case_sensitive: bool = True) -> bool:
    matcher = TreeMatcher([Glob.parse(glob)], is_case_sensitive=is_case_sensitive)
    return bool(together(matcher, path.strip("/").split("/")))


def together(matcher: TreeMatcher, names: list[str]) -> int:
    """Match a path as a walk does: its last name as a file, and as a directory likewise."""
    standing = matcher.root()
    for name in names[:-1]:
        standing = matcher.enter(standing, name)
    matched = matcher.match(standing, names[-1])
    assert matched == matcher.enter(standing, names[-1]).matched
    return matched


@pytest.mark.parametrize(
    ("glob", "inside", "outside"),
    [
        ("/etc/fstab", ["/etc/fstab", "/etc/fstab/x"], ["/etc", "/etc/fstab2", "/x/etc/fstab"]),
        ("/var/cache", ["/var/cache", "/var/cache/a/b"], ["/var", "/var/cache2", "/cache"]),
        ("/var/cache/", ["/var/cache/a"], ["/var"]),
        ("/var/cache/**", ["/var/cache/a", "/var/cache/a/b"], ["/var/cache", "/var"]),
        ("/", ["/a", "/a/b"], []),
        ("/**", ["/a", "/a/b/c"], []),
        ("/*", ["/a", "/.a", "/a/b"], []),
        ("/*/x", ["/a/x"], ["/x", "/a/b/x"]),
        ("/**/*.tmp", ["/a.tmp", "/a/b.tmp", "/a/b.tmp/c", "/.tmp"], ["/a.tmp2", "/a/b"]),
        ("/a/**/b", ["/a/b", "/a/x/b", "/a/x/y/b/z"], ["/b", "/a/xb", "/a"]),
        ("/**/a/**/b", ["/a/b", "/x/a/y/b"], ["/a", "/b/a"]),
        ("/a/**/**/b", ["/a/b", "/a/c/b"], ["/a"]),
        ("/a**b", ["/ab", "/axb"], ["/a/b", "/a/x/b"]),
        ("/a?c", ["/abc", "/a\udcffc", "/a\nc"], ["/ac", "/abbc"]),
        ("/[a-c]x", ["/ax", "/cx"], ["/dx", "/-x"]),
        ("/[!a-c]x", ["/dx"], ["/ax", "/x"]),
        ("/[^a]x", ["/bx"], ["/ax"]),
        ("/[]x]", ["/]", "/x"], ["/["]),
        ("/[a-]", ["/a", "/-"], ["/b"]),
        (r"/[\]\-]", ["/]", "/-"], ["/\\"]),
        (r"/\*\?\[", ["/*?["], ["/aab"]),
        (r"/a\\b", ["/a\\b"], ["/ab"]),
        ("/{a,b}", ["/{a,b}"], ["/a"]),
        ("/*a*b*", ["/ab", "/xaxbx"], ["/ba"]),
        ("/*.a.*", ["/x.a.y", "/.a."], ["/x.a"]),
        ("/a*a", ["/aa", "/aba"], ["/a"]),
        ("/ü*", ["/üx"], ["/ux"]),
        ("/ab$.(x)+", ["/ab$.(x)+"], ["/abxx"]),
    ],
)
def test_a_glob_means_these_and_not_those(glob: str, inside: list[str], outside: list[str]) -> None:
    assert [path for path in inside if not matches(glob, path)] == []
    assert [path for path in outside if matches(glob, path)] == []


def test_a_filesystem_that_ignores_case_is_matched_so() -> None:
    for glob in ("/Windows/*.Log", "/WINDOWS/[A-Z].log", "/windows/a.log", "/**/?.LOG"):
        assert matches(glob, "/wINDOWS/a.LOG", is_case_sensitive=False)
        assert not matches(glob, "/wINDOWS/a.LOGS", is_case_sensitive=False)
    assert not matches("/strasse", "/straße", is_case_sensitive=False)
    assert matches("/STRAßE", "/straße", is_case_sensitive=False)
    assert upcase("aßü") == "AßÜ"


# The slow matcher -----------------------------------------------------------------------------


def slow(parts: list[str], names: list[str]) -> bool:
    """Whether a glob matches a whole path, by trying every way to spend a `**`."""
    if not parts:
        return not names
    if parts[0] == "**":
        if len(parts) == 1:
            return bool(names)
        return slow(parts[1:], names) or (bool(names) and slow(parts, names[1:]))
    return bool(names) and slow_name(parts[0], names[0]) and slow(parts[1:], names[1:])


def slow_name(part: str, name: str) -> bool:
    if not part:
        return not name
    if part[0] == "*":
        return slow_name(part[1:], name) or (bool(name) and slow_name(part, name[1:]))
    return bool(name) and part[0] in ("?", name[0]) and slow_name(part[1:], name[1:])


NAMES = st.text("ab.", min_size=1, max_size=4)
PARTS = st.just("**") | st.text("ab.*?", min_size=1, max_size=5).filter(
    lambda part: part not in (".", "..")
)


@given(
    st.lists(st.lists(PARTS, min_size=1, max_size=4), min_size=1, max_size=6),
    st.lists(NAMES, min_size=1, max_size=5),
)
def test_globs_together_match_what_each_matches_alone(
    globs: list[list[str]], names: list[str]
) -> None:
    """A path is meant if the glob matches it or a directory above it."""
    matcher = TreeMatcher([Glob.parse("/" + "/".join(parts)) for parts in globs])
    expected = sum(
        1 << index
        for index, parts in enumerate(globs)
        if any(slow(parts, names[:depth]) for depth in range(1, len(names) + 1))
    )
    assert together(matcher, names) == expected


@given(st.text("/ab*?[]!^-\\.", max_size=12))
def test_any_text_is_a_glob_that_can_be_matched_or_an_error(text: str) -> None:
    try:
        glob = Glob.parse("/" + text)
    except RuleError:
        return
    matcher = TreeMatcher([glob])
    matcher.match(matcher.root(), "ab-a")


def test_no_name_makes_a_glob_slow() -> None:
    """Backtracking over sixty stars would not end before the test is given up."""
    glob = "/" + "*a" * 60 + "*b"
    assert not matches(glob, "/" + "a" * 255)


def test_a_thousand_globs_find_theirs_among_fifty_thousand_names() -> None:
    globs = [Glob.parse(f"/srv/d{n}/**") for n in range(500)]
    globs += [Glob.parse(f"/**/*.e{n}") for n in range(500)]
    matcher = TreeMatcher(globs)
    hits = 0
    srv = matcher.enter(matcher.root(), "srv")
    for directory in range(1000):
        inside = matcher.enter(srv, f"d{directory}")
        for file in range(50):
            hits += bool(matcher.match(inside, f"name{file}.e{file * 20}"))
    assert hits == 500 * 50 + 500 * 25


def test_what_a_class_holds_is_never_an_expression() -> None:
    glob = Glob.parse(r"/[.*+^$(|&~\-]")
    matcher = TreeMatcher([glob])
    for character in map(chr, range(32, 127)):
        if character == "/":
            continue
        matched = bool(matcher.match(matcher.root(), character))
        assert matched == (character in ".*+^$(|&~-"), character
