"""`stillblock rules`: set, add, show, explain."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Final

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
from stillblock.model import format_duration, format_size
from stillblock.operations.rules import (
    EVERYTHING,
    Explanation,
    RulesRequest,
    StandingRules,
    list_presets,
)
from stillblock.service.session import open_session

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from stillblock.operations.forecast import Forecast

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
    forecast: bool = False,
    common: Common = _COMMON,
) -> None:
    """Show what rules come to on the disk now, before anything is taken.

    While clients write, files and free space are told from a snapshot that is taken for it and
    deleted at once.

    Parameters
    ----------
    only_these
        Start afresh instead of appending to the standing rules.
    extents
        List every resolved extent.
    forecast
        Show instead which directories, and whether free space or swap, make up what changed since
        the oldest snapshot or bookmark: what excluding each would save a day.
    """
    output = Output(common)
    if forecast:
        if terms or only_these or extents:
            raise UsageError("--forecast looks at what changed, not at terms")
        with open_session(common.config(), volume_of(volume)) as session, _working(output):
            seen = session.forecast()
        output.result("forecast", seen, lambda out: _render_forecast(out, seen))
        return
    request = RulesRequest(terms=terms, only_these=only_these)
    with open_session(common.config(), volume_of(volume)) as session, _working(output):
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


def _working(output: Output) -> AbstractContextManager[object]:
    return output.working("reading the filesystems")


def _render_forecast(out: Output, seen: Forecast) -> None:
    if not seen.instant_count:
        out.line("nothing is known of changes yet: take a snapshot, and look again later")
        return
    out.line(
        f"{format_size(seen.changed_bytes)} changed in {_span(seen.span_ns)}, "
        f"counted anew after each of {counted(seen.instant_count, 'instant')}"
    )
    rows = [
        (
            f"--exclude {shlex.quote(candidate.term)}",
            f"{candidate.share * 100:.0f} %",
            format_size(candidate.changed_bytes),
            format_size(candidate.bytes_a_day),
        )
        for candidate in seen.candidates
    ]
    if rows:
        out.line()
        out.table(("WITH", ">SHARE", ">CHANGED", ">SAVES A DAY"), rows, empty="")
    for note in seen.notes:
        out.line(f"note: {note}")


def _span(span_ns: int) -> str:
    hours = span_ns / 3_600_000_000_000
    return format_duration(span_ns) if hours < 1 else f"{hours:.1f} h"


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
