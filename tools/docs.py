"""Write docs/cli.md from the program itself; with --check only say whether it is up to date."""

import sys
from pathlib import Path
from typing import Final

from stillblock.cli.app import build

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
NOTE: Final = (
    "<!-- Written by `make docs` from the program. Change the commands, not this page. -->\n\n"
)


def main(arguments: list[str]) -> int:
    """Return 0 if the page is, or now is, what the program says."""
    text = NOTE + "\n".join(line.rstrip() for line in build().generate_docs().splitlines()) + "\n"
    current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if arguments == ["--check"]:
        if current == text:
            return 0
        print("docs/cli.md is not what the program says: run make docs", file=sys.stderr)
        return 1
    if arguments:
        print("usage: tools/docs.py [--check]", file=sys.stderr)
        return 2
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
