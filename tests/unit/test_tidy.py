"""House rules as tests: what a reviewer would otherwise have to say every week.

Each test lists every breach it finds as `file:line: what`, so that one run shows all of them.
"""

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINE_COLUMNS_MAX = 100
# rustfmt holds code to 100 and leaves comments alone.
RUST_COMMENT_COLUMNS_MAX = 120
FILE_LINES_SOFT = 500
FILE_LINES_HARD = 800

pytestmark = pytest.mark.needs("git")

# Words that say nothing about what a thing is for.
BANNED_FILES = re.compile(r"(^|/)(utils?|helpers?|common|misc|stuff)\.(py|rs)$")
BANNED_TYPES = re.compile(r"(Manager|Helper|Helpers|Util|Utils)$")
BANNED_FUNCTIONS = {"process", "handle", "do_it", "do_work", "manage"}

# Written in halves so that this file does not name what it forbids.
FORBIDDEN_TEXT = {
    re.compile(r"\.\./" + "shared"): "a directory outside the repository",
    re.compile(r"(?<![\w.])/(?:wo" + r"rk|tm" + r"p/wt|ro" + r"ot)/\w"): "a path of one machine",
    re.compile("/ho" + r"me/(?!user\b|you\b)\w+/"): "a path of one machine",
    re.compile(r"pypi\." + r"org|pythonhosted\." + "org"): "a registry's host",
    re.compile(r"crates\." + r"io|deb\." + r"debian\." + "org"): "a registry's host",
}
# A crate may be linked into what we ship under Apache-2.0 if one of these is offered.
LICENCES = {
    "Apache-2.0",
    "MIT",
    "MIT-0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unlicense",
}
LICENCES |= {"Unicode-3.0", "0BSD", "CC0-1.0", "Apache-2.0 WITH LLVM-exception", "BSL-1.0"}
# Written by tools, or by others.
NOT_OURS = {"Cargo.lock", "LICENSE"}

# Modules that are pure: bytes in, bytes out. Files, sockets, threads and clocks are passed to them.
PURE_RUST = re.compile(r"^crates/core/src/(extent|bitmap|nbd/(wire|session))\b.*\.rs$")
IMPURE_RUST = re.compile(
    r"\bstd::(fs|net|os|thread|process|env)\b|\b(Instant|SystemTime)::now\b|\brustix::"
)
OFFSETS = {"offset", "offset_bytes"}
LENGTHS = {"length", "length_bytes", "size_bytes"}


@cache
def tracked() -> tuple[str, ...]:
    """Every file that is or would be in a commit, but for those deleted in the work tree."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = sorted(set(filter(None, listing.split("\0"))))
    return tuple(name for name in names if (ROOT / name).is_file())


def named(*patterns: str) -> list[str]:
    return [name for name in tracked() if any(Path(name).match(pattern) for pattern in patterns)]


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(text_of(name), filename=name)


def is_test(name: str) -> bool:
    return name.startswith("tests/") or "/tests/" in name or name.endswith(("/tests.rs",))


def report(breaches: list[str], rule: str) -> None:
    assert not breaches, f"{rule}\n  " + "\n  ".join(breaches)


def first_comment(name: str) -> str:
    """The docstring or the leading comment lines."""
    if name.endswith(".py"):
        return ast.get_docstring(tree_of(name)) or ""
    lines = []
    for line in text_of(name).splitlines():
        if not line.startswith(("//", "#")):
            break
        lines.append(line.lstrip("/!# "))
    return "\n".join(lines)


def test_a_source_file_begins_with_its_purpose():
    breaches = []
    for name in named("*.py", "*.rs"):
        if not text_of(name).strip():
            breaches.append(f"{name}: empty")
        elif not first_comment(name).strip():
            breaches.append(f"{name}:1: say what this file is for")
    for name in named("tools/*", ".ci/*"):
        text = text_of(name)
        if text.startswith("#!") and not re.match(r"#!.*\n(# \S|\"\"\"\S)", text):
            breaches.append(f"{name}:2: say what this script is for")
    report(breaches, "The first lines of a file say its purpose.")


def test_a_file_is_short_or_says_why_not():
    breaches = []
    for name in named("*.py", "*.rs"):
        line_count = text_of(name).count("\n")
        if is_test(name) or line_count <= FILE_LINES_SOFT:
            continue
        print(f"{name}: {line_count} lines, past the soft limit of {FILE_LINES_SOFT}")
        if line_count > FILE_LINES_HARD and "long because" not in first_comment(name).lower():
            breaches.append(f"{name}: {line_count} lines")
    report(breaches, f'Past {FILE_LINES_HARD} lines the first comment has "long because ...".')


def test_names_say_what_a_thing_is_for():
    breaches = [f"{name}: file name" for name in tracked() if BANNED_FILES.search(name)]
    for name in named("*.py"):
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.ClassDef) and BANNED_TYPES.search(node.name):
                breaches.append(f"{name}:{node.lineno}: class {node.name}")
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and node.name in BANNED_FUNCTIONS
                and not node.decorator_list  # a property may be a process
            ):
                breaches.append(f"{name}:{node.lineno}: def {node.name}")
    declaration = re.compile(r"\b(?:(fn)|struct|enum|trait|type) (\w+)")
    for name in named("*.rs"):
        for number, line in numbered(name):
            for match in declaration.finditer(line.partition("//")[0]):
                is_function, declared = match.groups()
                banned = declared in BANNED_FUNCTIONS if is_function else None
                if banned or (not is_function and BANNED_TYPES.search(declared)):
                    breaches.append(f"{name}:{number}: {match.group()}")
    report(breaches, "Field words only: name the thing, not that it does something.")


def numbered(name: str) -> Iterator[tuple[int, str]]:
    yield from enumerate(text_of(name).splitlines(), start=1)


def columns_max(name: str, line: str) -> int:
    code_columns = len(line.partition("//")[0].rstrip())
    ends_in_comment = name.endswith(".rs") and code_columns <= LINE_COLUMNS_MAX
    return RUST_COMMENT_COLUMNS_MAX if ends_in_comment else LINE_COLUMNS_MAX


def test_lines_fit_the_page():
    breaches = [
        f"{name}:{number}: {len(line)} columns"
        for name in named("*.py", "*.rs")
        for number, line in numbered(name)
        # An address cannot be broken.
        if len(line) > columns_max(name, line) and "://" not in line
    ]
    report(breaches, f"At most {LINE_COLUMNS_MAX} columns of code and comment.")


def test_nothing_refers_to_one_machine():
    breaches = []
    for name in tracked():
        if name in NOT_OURS:
            continue
        try:
            lines = text_of(name).splitlines()
        except UnicodeDecodeError:
            continue  # golden data
        breaches += [
            f"{name}:{number}: {what}: {match.group()}"
            for number, line in enumerate(lines, start=1)
            for pattern, what in FORBIDDEN_TEXT.items()
            if (match := pattern.search(line))
        ]
    report(breaches, "A clone works anywhere.")


def test_only_native_imports_the_rust_module():
    breaches = []
    for name in named("*.py"):
        if name == "src/stillblock/native.py" or not name.startswith("src/"):
            continue
        for node in ast.walk(tree_of(name)):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or "", *(alias.name for alias in node.names)]
            if any(module.split(".")[-1] == "_native" for module in modules):
                breaches.append(f"{name}:{node.lineno}: imports _native")
    report(breaches, "stillblock.native is the only gateway to Rust.")


def test_an_offset_and_a_length_are_passed_by_name():
    breaches = []
    for name in named("*.py"):
        if not name.startswith("src/"):
            continue
        for node in ast.walk(tree_of(name)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            positional = {arg.arg for arg in (*node.args.posonlyargs, *node.args.args)}
            every = positional | {arg.arg for arg in node.args.kwonlyargs}
            if every & OFFSETS and every & LENGTHS and positional & (OFFSETS | LENGTHS):
                breaches.append(f"{name}:{node.lineno}: {node.name}")
    report(breaches, "Offset and length never mix: they are keyword-only.")


def test_pure_rust_modules_do_no_io():
    breaches = [
        f"{name}:{number}: {match.group()}"
        for name in named("*.rs")
        if PURE_RUST.match(name)
        for number, line in numbered(name)
        if (match := IMPURE_RUST.search(line.partition("//")[0]))
    ]
    report(breaches, "Protocol, extents and bitmaps are data in, data out.")


def test_links_in_documents_resolve():
    breaches = []
    for name in named("*.md"):
        body = re.sub(r"^```.*?^```", "", text_of(name), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", body):
            if re.match(r"[a-z+]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            if not file.exists():
                breaches.append(f"{name}: {target}: no such file")
            elif anchor and file.suffix == ".md" and anchor not in anchors_of(file):
                breaches.append(f"{name}: {target}: no such heading")
    report(breaches, "Links in documents resolve.")


def anchors_of(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_architecture_names_every_format():
    formats = named("docs/formats/*.md")
    architecture = text_of("ARCHITECTURE.md") if formats else ""
    breaches = [name for name in formats if name not in architecture]
    report(breaches, "ARCHITECTURE.md points at every page of docs/formats.")


@pytest.mark.needs("cargo")
def test_every_crate_has_a_licence_that_lets_us_ship_it():
    shown = subprocess.run(
        ["cargo", "metadata", "--locked", "--offline", "--format-version", "1"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    breaches = [
        f"{crate['name']} {crate['version']}: {crate['license']}"
        for crate in json.loads(shown.stdout)["packages"]
        if not licence_is_fine(crate["license"] or "")
    ]
    report(breaches, "Only permissive licences; ask before adding another.")


def licence_is_fine(expression: str) -> bool:
    """Judge an SPDX expression of ANDs of ORs, and the old form with a slash."""
    parts = re.sub(r"[()]", "", expression).replace("/", " OR ").split(" AND ")
    return all(LICENCES & {choice.strip() for choice in part.split(" OR ")} for part in parts)
