"""The generated part of docs/performance.md."""

from collections.abc import Sequence
from pathlib import Path

from bench.errors import UsageError
from bench.goals import Outcome
from bench.results import Results
from bench.tables import as_markdown, caveat_lines, context_lines, goal_table, result_tables

BEGIN = "<!-- begin results: written by `python -m bench report`, do not edit -->"
END = "<!-- end results -->"


def as_document(results: Results, outcomes: Sequence[Outcome]) -> str:
    """Goals, circumstances and all tables in Markdown, worst news first."""
    caveats = caveat_lines(results)
    parts = []
    if caveats:
        parts.append("**Not to be quoted as it stands:**\n\n" + _list(caveats))
    parts.append(_list(context_lines(results)))
    parts += [as_markdown(table) for table in (goal_table(outcomes), *result_tables(results))]
    return "\n\n".join(parts)


def replace_block(document: str, block: str) -> str:
    """The document with a new block between its markers; raise UsageError without them."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"the document has no place for results: lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def write_block(path: Path, block: str) -> None:
    """Replace the generated part of a file."""
    path.write_text(replace_block(path.read_text(encoding="utf-8"), block), encoding="utf-8")


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
