"""The documents cannot lie: docs/cli.md is the program, docs/api.md runs."""

import doctest
from pathlib import Path

from stillblock.cli.app import build
from stillblock.cli.reference import reference

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_line_page_is_the_program():
    page = (ROOT / "docs" / "cli.md").read_text()
    assert page == reference(), "run: python -m stillblock.cli.reference > docs/cli.md"


def test_every_argument_and_option_has_help():
    bare = [line for line in reference().splitlines() if line.startswith("* `")]
    assert bare
    undescribed = [line for line in bare if line.rstrip().endswith(("`:", "`: **[required]**"))]
    assert undescribed == []


def test_every_command_has_help():
    for noun in ("volume", "rules", "snapshot", "bookmark", "restore", "hook"):
        app = build()[noun]
        for verb in app:
            if not verb.startswith("-"):
                assert app[verb].help, f"{noun} {verb}"


def test_the_examples_of_the_library_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STILLBLOCK_STATE", str(tmp_path / "state"))
    ran = doctest.testfile(
        str(ROOT / "docs" / "api.md"), module_relative=False, optionflags=doctest.ELLIPSIS
    )
    assert ran.attempted > 20
    assert ran.failed == 0
