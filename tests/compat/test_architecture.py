"""ARCHITECTURE.md names tests and files; they exist."""

from __future__ import annotations

import re

from compat.layout import ROOT

TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_ten_promises_are_numbered_in_order():
    assert re.findall(r"^\*\*P(\d+) ", TEXT, flags=re.MULTILINE) == [str(n) for n in range(1, 11)]


def test_every_test_it_names_is_in_the_file_named_before_it():
    promises = TEXT.partition("## Promises")[2].partition("\n## ")[0]
    file, missing = None, []
    for word in re.findall(r"`([\w./]+)`", promises):
        if word.endswith((".rs", ".py")):
            file = next(
                (p for p in (ROOT / word, *ROOT.glob(f"*/*/src/{word}")) if p.exists()), None
            )
            file = file or next(iter(ROOT.glob(f"src/stillblock/{word}")), None)
            if file is None:
                missing.append(word)
        elif "_" in word and len(word.split("_")) > 3:
            name = re.compile(rf"\b(?:def|fn) {word}\b")
            if file is None or not name.search(file.read_text(encoding="utf-8")):
                missing.append(f"{word} in {file}")
    assert not missing


def test_every_module_of_the_package_and_of_the_core_is_listed():
    layers = TEXT.partition("## Layers")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`([\w/]+)`", layers))
    core = ROOT / "crates/core/src"
    modules = {str(p.relative_to(core))[:-3] for p in core.rglob("*.rs")}
    modules -= {"lib", "log/mod", "nbd/mod"}
    package = ROOT / "src/stillblock"
    modules |= {p.stem for p in package.glob("*.py") if not p.stem.startswith("_")}
    modules |= {f"{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert modules <= listed


def test_every_rule_that_can_be_broken_has_its_promise():
    source = (ROOT / "crates/core/src/sabotage.rs").read_text(encoding="utf-8")
    rules = re.findall(r"^    ([A-Z]\w+),$", source, flags=re.MULTILINE)
    table = set(re.findall(r"`([A-Z]\w+)`", TEXT.partition("## Promises")[2]))
    assert len(rules) >= 20
    assert set(rules) <= table
