"""`stillblock rules`: set, add, show, explain."""

from __future__ import annotations

from typing import Annotated, Final

from cyclopts import Parameter

from stillblock.cli.app import new_app
from stillblock.cli.options import Common, Terms, VolumeName, volume_of
from stillblock.cli.output import (
    DEFAULT_TOLD,
    Output,
    counted,
    extents_rows,
    percent,
    show_left_out,
    show_terms,
    show_unresolved,
)
from stillblock.errors import UsageError
from stillblock.model import format_size
from stillblock.operations.rules import (
    EVERYTHING,
    Explanation,
    RulesRequest,
    StandingRules,
    list_presets,
)
from stillblock.service.session import open_session

app = new_app("rules")

_COMMON: Final = Common()


@app.command(name="set")
def set_(
    volume: VolumeName,
    /,
    *,
    terms: Terms = (),
    all_: Annotated[bool, Parameter(name="--all", help="Keep everything.")] = False,
    default: Annotated[
        bool, Parameter(help="No rules: free space and swap are left out, as at first.")
    ] = False,
    common: Common = _COMMON,
) -> None:
    """Replace the standing rules of a volume."""
    if bool(terms) + all_ + default != 1:
        raise UsageError(
            "say which terms with --include, --exclude and --preset, or --all, or --default"
        )
    chosen = EVERYTHING if all_ else terms
    with open_session(common.config(), volume_of(volume)) as session:
        _show(Output(common), session.set_rules(RulesRequest(terms=chosen)))


@app.command
def add(volume: VolumeName, /, *, terms: Terms = (), common: Common = _COMMON) -> None:
    """Append terms to the standing rules of a volume."""
    if not terms:
        raise UsageError("say which terms with --include and --exclude")
    with open_session(common.config(), volume_of(volume)) as session:
        _show(Output(common), session.add_rules(RulesRequest(terms=terms)))


@app.command
def show(volume: VolumeName, /, *, common: Common = _COMMON) -> None:
    """Show the standing rules of a volume."""
    with open_session(common.config(), volume_of(volume)) as session:
        _show(Output(common), session.show_rules())


@app.command
def explain(
    volume: VolumeName,
    /,
    *,
    terms: Terms = (),
    only_these: bool = False,
    extents: bool = False,
    common: Common = _COMMON,
) -> None:
    """Show what rules come to on the disk now, before anything is taken.

    Parameters
    ----------
    only_these
        Start afresh instead of appending to the standing rules.
    extents
        List every resolved extent.
    """
    output = Output(common)
    request = RulesRequest(terms=terms, only_these=only_these)
    with open_session(common.config(), volume_of(volume)) as session:
        found = session.explain(request)
    output.result("explanation", found, lambda out: _render(out, found, with_extents=extents))
    for note in found.notes:
        output.warn(note)


@app.command
def presets(*, common: Common = _COMMON) -> None:
    """List the presets: those that are shipped, and NAME.toml in the state directory's presets."""
    found = [
        {"name": preset.name, "description": preset.description, "terms": list(preset.terms)}
        for preset in list_presets(common.config())
    ]

    def render(out: Output) -> None:
        for preset in found:
            out.line(f"{preset['name']}: {preset['description']}")
            for action, text in preset["terms"]:
                out.line(f"    {action} {text}")

    Output(common).result("presets", {"presets": found}, render)


def _render(out: Output, found: Explanation, *, with_extents: bool) -> None:
    if found.is_default:
        out.line(f"nobody gave rules: {DEFAULT_TOLD.format(volume=found.volume)}")
        out.line()
    if found.terms:
        show_terms(out, found.outcomes())
        out.line()
    share = percent(found.selected_bytes, found.size_bytes)
    out.line(
        f"selected {format_size(found.selected_bytes)} of {format_size(found.size_bytes)} "
        f"({share}) in {counted(len(found.extents), 'extent')}"
    )
    show_left_out(out, found.left_out)
    show_unresolved(out, found.outcomes())
    if with_extents:
        out.line()
        out.table((">START", ">END", ">SIZE"), extents_rows(found.extents), empty="no extents")


def _default(standing: StandingRules) -> str:
    if standing.default:
        return DEFAULT_TOLD.format(volume=standing.volume)
    return "everything is selected, for nothing on it has free space or swap that can be told"


def _show(output: Output, standing: StandingRules) -> None:
    rows = [(str(i), str(term)) for i, term in enumerate(standing.rules, start=1)]

    def render(out: Output) -> None:
        if rows:
            out.table((">", "TERM"), rows, empty="")
        else:
            out.line(f"nobody gave {standing.volume} rules: {_default(standing)}")

    output.result("rules", standing, render)
