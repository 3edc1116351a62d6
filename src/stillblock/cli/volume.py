"""`stillblock volume`: add, list, show, set, resize, release, import, remove; upkeep beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

from cyclopts import Group, Parameter

from stillblock.cli import upkeep
from stillblock.cli.app import new_app
from stillblock.cli.options import SIZE, Change, Common, Size, Terms, VolumeName, volume_of
from stillblock.cli.output import (
    DEFAULT_TOLD,
    Output,
    age,
    counted,
    percent,
    rules_text,
    size_exact,
)
from stillblock.errors import InUseError, UsageError
from stillblock.model import (
    BLOCK_SIZE_DEFAULT,
    Consistency,
    ConsistencySettings,
    OnFull,
    Quiet,
    StoreUsage,
    UsageLevel,
    format_instant,
    format_size,
)
from stillblock.operations import imports, usage, volumes
from stillblock.operations.consistency import ConsistencyRequest
from stillblock.operations.usage import PolicyRequest
from stillblock.service.client import find_server
from stillblock.service.session import open_session

app = new_app("volume")

_COMMON: Final = Common()
_CHANGE: Final = Change()
_CONSISTENCY: Final = Group.create_ordered("Consistency of its snapshots")
_LISTED: Final = Parameter(group=_CONSISTENCY, consume_multiple=False, negative="")


@app.command
def add(
    name: str,
    /,
    *,
    origin: Path,
    store: Path | None = None,
    block_size: Size = BLOCK_SIZE_DEFAULT,
    store_policy: OnFull = OnFull.DEGRADE,
    store_limit: Size = 0,
    terms: Terms = (),
    change: Change = _CHANGE,
) -> None:
    """Make a volume of a plain raw file or a block device.

    The origin is not changed. Images that are not raw, disks that are mounted or belong to another
    volume, and a store on the disk itself are refused, with what to do instead.

    Parameters
    ----------
    name
        What to call it.
    origin
        The raw file or block device with the live data.
    store
        A new directory for all that is kept about it; may be on another disk.
    block_size
        The unit of tracking: a power of two from 4096 to 65536.
    store_policy
        What happens when the store is full. degrade: writes go on, snapshots lose what changes;
        hold: first changes wait for room; fail: they get an I/O error.
    store_limit
        What the store may take; 0: as much as its filesystem has.
    """
    output, config = Output(change), change.config()
    request = volumes.AddRequest(
        name=name,
        origin=origin,
        store=store,
        block_size=block_size,
        rules=terms,
        on_full=store_policy,
        store_limit_bytes=store_limit,
    )
    plan = volumes.plan_add(config, request)
    share = percent(plan.selected_bytes, plan.size_bytes)

    def render(out: Output) -> None:
        verb = "would add" if change.dry_run else "added"
        out.line(f"{verb} {plan.name}: {format_size(plan.size_bytes)} of {plan.origin}")
        out.line(f"store {plan.store}")
        if plan.default:
            out.line(f"standing rules: none; {DEFAULT_TOLD.format(volume=plan.name)}")
        else:
            out.line(f"standing rules: {rules_text(plan.rules)}, {share} of the disk now")

    if change.dry_run:
        output.result("volume-add-plan", plan, render)
        return
    entry = volumes.add_volume(config, plan)
    output.result("volume-added", {"volume": entry, "plan": plan}, render)
    output.remark(f"next: stillblock serve {plan.name}")


@app.command(name="list")
def list_(*, common: Common = _COMMON) -> None:
    """List the volumes."""
    output, config = Output(common), common.config()
    found = volumes.list_volumes(config, lambda name: find_server(config, name) is not None)
    rows = [
        (
            v.name,
            str(v.state),
            "-" if v.size_bytes is None else format_size(v.size_bytes),
            v.origin,
            v.store,
        )
        for v in found
    ]
    output.result(
        "volume-list",
        {"volumes": found},
        lambda out: out.table(
            ("NAME", "STATE", ">SIZE", "ORIGIN", "STORE"), rows, empty="no volumes yet"
        ),
    )
    for volume in found:
        if volume.note:
            output.warn(f"{volume.name}: {volume.note}")


@app.command
def show(volume: VolumeName, /, *, common: Common = _COMMON) -> None:
    """Show a volume: origin, store, rules, what its snapshots take."""
    output, config = Output(common), common.config()
    with open_session(config, volume_of(volume)) as session:
        info = session.show_volume()
        exports = session.exports().exports
        found = session.store_usage()
        standing = session.consistency()

    def render(out: Output) -> None:
        out.pairs(
            (
                ("volume", info.name),
                ("uuid", info.uuid),
                ("origin", info.origin),
                ("store", info.store),
                ("state", "served" if info.is_served else "stopped"),
                ("size", size_exact(info.size_bytes)),
                ("block size", format_size(info.block_size)),
                ("standing rules", rules_text(info.rules, none="none")),
                ("snapshots", str(info.snapshot_count)),
                ("bookmarks", str(info.bookmark_count)),
                ("kept for them", format_size(info.store_bytes)),
                *_usage_rows(found),
                *_consistency_rows(standing.settings),
                (
                    "made",
                    f"{format_instant(info.created_unix_ns)} ({age(info.created_unix_ns)} ago)",
                ),
                ("last verified", upkeep.verified_text(info.last_verified_unix_ns)),
                ("DAMAGED", format_size(info.damaged_bytes) if info.damaged_bytes else ""),
                ("SUSPECT", info.suspect_reason),
            )
        )
        for export in exports:
            out.line(export.uri)

    output.result(
        "volume",
        {
            "volume": info,
            "exports": exports,
            "store": found,
            "consistency": standing.settings,
        },
        render,
    )
    if text := usage.describe(found):
        output.warn(text)


@app.command(name="set")
def set_(
    volume: VolumeName,
    /,
    *,
    store_policy: OnFull | None = None,
    store_limit: Annotated[int | None, SIZE] = None,
    consistency: Annotated[Consistency | None, Parameter(group=_CONSISTENCY)] = None,
    or_barrier: Annotated[bool | None, Parameter(group=_CONSISTENCY)] = None,
    quiet: Annotated[Quiet | None, Parameter(group=_CONSISTENCY)] = None,
    quiet_time: Annotated[int | None, Parameter(group=_CONSISTENCY)] = None,
    idle_limit: Annotated[int | None, Parameter(group=_CONSISTENCY)] = None,
    freeze_mount: Annotated[tuple[str, ...] | None, _LISTED] = None,
    guest_agent: Annotated[str | None, Parameter(group=_CONSISTENCY)] = None,
    guest_mount: Annotated[tuple[str, ...] | None, _LISTED] = None,
    freeze_limit: Annotated[int | None, Parameter(group=_CONSISTENCY)] = None,
    hooks: Annotated[str | None, Parameter(group=_CONSISTENCY)] = None,
    hook_limit: Annotated[int | None, Parameter(group=_CONSISTENCY)] = None,
    common: Common = _COMMON,
) -> None:
    """Change how a volume behaves; in force at once, also while it is served.

    Parameters
    ----------
    store_policy
        degrade: writes go on, snapshots lose what changes, of low priority first; hold: first
        changes wait until there is room; fail: they get an I/O error.
    store_limit
        What the store may take; 0: as much as its filesystem has.
    consistency
        The level of its snapshots: barrier, idle, filesystem or application.
    or_barrier
        Where that cannot be reached, fall back to barrier and say so, instead of taking nothing.
    quiet
        Which writers wait for an instant: of the whole device, or of selected blocks.
    quiet_time
        idle: milliseconds without a write.
    idle_limit
        idle: how many milliseconds to wait for that.
    freeze_mount
        filesystem: a mount point on this volume to freeze, as often as needed; "" for none.
    guest_agent
        filesystem: the socket of the QEMU guest agent of the guest that uses it; "" for none.
    guest_mount
        A mount point to freeze in the guest, as often as needed; default: all it has.
    freeze_limit
        Milliseconds after which everything is thawed, whatever happened.
    hooks
        application: a directory of executables, run before and after the instant; "" for none.
    hook_limit
        Milliseconds that each hook may take, and that applications are held prepared.
    """
    wanted = ConsistencyRequest(
        level=consistency,
        or_barrier=or_barrier,
        quiet=quiet,
        quiet_ms=quiet_time,
        idle_limit_ms=idle_limit,
        mounts=freeze_mount,
        agent=guest_agent,
        agent_mounts=guest_mount,
        freeze_limit_ms=freeze_limit,
        hooks=hooks,
        hook_limit_ms=hook_limit,
    )
    has_policy = store_policy is not None or store_limit is not None
    has_consistency = wanted != ConsistencyRequest()
    if not has_policy and not has_consistency:
        raise UsageError("say what to change, for example --store-policy or --consistency")
    output, config = Output(common), common.config()
    request = PolicyRequest(on_full=store_policy, limit_bytes=store_limit)
    with open_session(config, volume_of(volume)) as session:
        if has_consistency:
            session.set_consistency(wanted)
        found = session.set_store_policy(request) if has_policy else session.store_usage()
        standing = session.consistency()
    output.result(
        "volume-settings",
        {"store": found, "consistency": standing.settings},
        lambda out: out.pairs((*_usage_rows(found), *_consistency_rows(standing.settings))),
    )
    if text := usage.describe(found):
        output.warn(text)


@app.command
def resize(volume: VolumeName, /, *, common: Common = _COMMON) -> None:
    """Take over the origin's present length, after it grew."""
    output, config = Output(common), common.config()
    with open_session(config, volume_of(volume)) as session:
        done = session.resize()
    output.result(
        "volume-resized",
        done,
        lambda out: out.line(
            f"{done.volume}: {format_size(done.size_bytes_before)} before, "
            f"{format_size(done.size_bytes)} now"
        ),
    )


@app.command
def release(
    volume: VolumeName,
    /,
    *,
    force: Annotated[
        bool, Parameter(help="Also while something of it is mounted: it is unmounted.")
    ] = False,
    common: Common = _COMMON,
) -> None:
    """Stop cleanly: the origin is complete afterwards, and any tool can use it.

    If a process serves the volume, its clients are cut and it ends with its last volume.
    """
    output, config = Output(common), common.config()
    with open_session(config, volume_of(volume)) as session:
        done = session.release(force=force)
    _show_released(output, done)


app.command(upkeep.recover)
app.command(upkeep.check)
app.command(upkeep.scrub)


@app.command(name="import")
def import_(
    store: Path,
    /,
    *,
    name: str | None = None,
    origin: Path | None = None,
    accept_origin: bool = False,
    change: Change = _CHANGE,
) -> None:
    """Put a store on the list again, after it was moved or the catalog was lost.

    Says which snapshots are in it, and refuses an origin that does not fit.

    Parameters
    ----------
    store
        The volume's store directory.
    name
        What to call it here; default: as the store says.
    origin
        Where the origin is now; default: as the store says.
    accept_origin
        Let a restore go on on an origin that is not the very disk it was running on.
    """
    output, config = Output(change), change.config()
    plan = imports.plan_import(
        config,
        imports.ImportRequest(store=store, name=name, origin=origin, accept_origin=accept_origin),
    )

    def render(out: Output) -> None:
        verb = "would import" if change.dry_run else "imported"
        out.line(f"{verb} {plan.name}: {plan.origin}, store {plan.store}")
        kept = counted(len(plan.snapshots), "snapshot")
        out.line(f"{kept}, {counted(plan.bookmark_count, 'bookmark')}")
        for snapshot in plan.snapshots:
            damage = f"  DAMAGED: {snapshot.damage}" if snapshot.damage else ""
            out.line(f"  {plan.name}@{snapshot.name}{damage}")

    if change.dry_run:
        output.result("volume-import-plan", plan, render)
    else:
        entry = imports.import_volume(config, plan)
        output.result("volume-imported", {"volume": entry, "plan": plan}, render)
    for note in plan.notes:
        output.warn(note)


@app.command
def remove(
    volume: VolumeName,
    /,
    *,
    keep_store: Annotated[
        bool, Parameter(help="Only take it off the list; `volume import` puts it back.")
    ] = False,
    change: Change = _CHANGE,
) -> None:
    """Delete a volume's store with all its snapshots. The origin stays, complete."""
    output, config, name = Output(change), change.config(), volume_of(volume)
    if find_server(config, name) is not None:
        raise InUseError(f"{name} is served", hint=f"first: stillblock volume release {name}")
    plan = volumes.plan_remove(config, name, keep_store=keep_store)

    def render(out: Output) -> None:
        what = "deletes" if plan.deletes_store else "keeps"
        out.line(
            f"{plan.name}: {what} {plan.store} with {counted(len(plan.snapshots), 'snapshot')}"
        )
        out.line(f"the origin {plan.origin} stays as it is")

    if change.dry_run:
        output.result("volume-remove-plan", plan, render)
        return
    if not change.yes and not output.is_json:
        render(output)
    output.confirm(change, f"Remove volume {name}?")
    volumes.remove_volume(config, plan)
    output.result("volume-removed", plan, lambda out: out.line(f"removed {plan.name}"))


def _show_released(output: Output, done: volumes.Released) -> None:
    output.result(
        "volume-released",
        done,
        lambda out: out.line(
            f"released {done.volume}: {done.origin} is complete, any tool can use it"
        ),
    )


def _consistency_rows(found: ConsistencySettings) -> tuple[tuple[str, str], ...]:
    level = f"{found.level}, or barrier" if found.or_barrier else str(found.level)
    guest = ", ".join(found.agent_mounts) or "all filesystems"
    is_idle = found.level is Consistency.IDLE
    quiet = f"{found.quiet_ms} ms without a write, within {found.idle_limit_ms} ms"
    is_frozen = bool(found.mounts or found.agent)
    return (
        ("consistency", level),
        ("who waits", "writers of selected blocks" if found.quiet is Quiet.SELECTED else ""),
        ("quiet time", quiet if is_idle else ""),
        ("freezes", ", ".join(found.mounts)),
        ("freezes by agent", f"{guest} of {found.agent}" if found.agent else ""),
        ("freeze limit", f"{found.freeze_limit_ms} ms" if is_frozen else ""),
        ("hooks", f"{found.hooks}, {found.hook_limit_ms} ms each" if found.hooks else ""),
    )


def _usage_rows(found: StoreUsage) -> tuple[tuple[str, str], ...]:
    limit = "none" if found.limit_bytes is None else format_size(found.limit_bytes)
    room = f"{format_size(found.used_bytes)} of {format_size(found.capacity_bytes)}"
    return (
        ("when full", str(found.on_full)),
        ("store limit", limit),
        ("store takes", f"{room} ({found.percent} %)"),
        ("STORE", "" if found.level is UsageLevel.OK else str(found.level)),
        ("held writes", str(found.held_writes) if found.held_writes else ""),
    )
