"""The bare commands: serve, status, run, events, doctor, demo, completion."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from cyclopts import Parameter

from stillblock.cli.options import Common, Size, SnapshotRef, snapshot_of, volume_of
from stillblock.cli.output import Output, counted
from stillblock.errors import ExitCode, StillblockError, UsageError
from stillblock.model import Event, format_duration, format_instant, format_size

if TYPE_CHECKING:
    from stillblock.service.serve import Ready

_COMMON: Final = Common()
_FOLLOW_POLL_S: Final = 0.5
_BUFFER_BYTES_DEFAULT: Final = 64 * 1024 * 1024


def serve(
    *volumes: str,
    listen: tuple[str, ...] = (),
    attach: Annotated[
        Literal["qemu", "libvirt", "nbd-client", "nbdfuse"] | None, Parameter(name="--print")
    ] = None,
    cache: Literal["writeback", "writethrough"] = "writeback",
    direct: bool = False,
    buffer_dir: Path | None = None,
    buffer_size: Size = _BUFFER_BYTES_DEFAULT,
    excluded_reads: Literal["zeros", "error"] = "zeros",
    read_only: bool = False,
    common: Common = _COMMON,
) -> None:
    """Serve volumes to NBD clients until stopped by a signal or by `volume release`.

    Prints the URIs when clients can come. The live disk is exported as VOL, each snapshot as
    VOL@SNAP, each clone as VOL@SNAP+CLONE. A clean stop leaves the origin complete.

    Parameters
    ----------
    volumes
        The volumes to serve.
    listen
        Where NBD clients connect: a socket's path, or HOST:PORT on loopback; as often as needed.
    attach
        Print what to paste to attach the disk to this kind of client.
    cache
        writeback: writes wait in a bounded buffer as in a disk's cache, flushes make them durable;
        writethrough: no buffer.
    direct
        Use direct I/O on the origin, past the page cache.
    buffer_dir
        A directory in memory for the write buffer; default: one that survives a kill of the server.
    buffer_size
        The write buffer's size.
    excluded_reads
        What reading a block outside a snapshot's selection gives.
    read_only
        Refuse writes to the live disk.
    """
    from stillblock.operations.volume import EngineOptions  # noqa: PLC0415 - only to serve
    from stillblock.service.serve import ServeOptions, parse_listener  # noqa: PLC0415
    from stillblock.service.serve import serve as run  # noqa: PLC0415

    if not volumes:
        raise UsageError("say which volume to serve: stillblock serve VOL")
    output = Output(common)
    options = ServeOptions(
        engine=EngineOptions(
            cache=cache, direct=direct, buffer_dir=buffer_dir, buffer_bytes=buffer_size
        ),
        listeners=tuple(parse_listener(text) for text in listen),
        excluded_reads=excluded_reads,
        is_read_only=read_only,
    )
    names = tuple(volume_of(name) for name in volumes)
    released = run(
        common.config(),
        names,
        options,
        on_ready=lambda ready: _announce(output, ready, attach),
    )
    if output.is_json:
        output.json("stopped", {"volumes": released})
    for done in released:
        output.remark(f"released {done.volume}: {done.origin} is complete, any tool can use it")


def _announce(output: Output, ready: Ready, attach: Any) -> None:
    from stillblock.service.attachments import attachment  # noqa: PLC0415

    pasteable = {}
    if attach is not None:
        if not ready.nbd_sockets:
            raise UsageError("--print needs a Unix socket to listen on")
        pasteable = {
            name: attachment(attach, export=name, socket_path=ready.nbd_sockets[0])
            for name in ready.volumes
        }
    if output.is_json:
        output.json("ready", {"serve": ready, "attachments": pasteable})
        return
    # One write: who reads our output for a URI finds it whole.
    lines = [*(export.uri for export in ready.exports), *pasteable.values()]
    print("\n".join(lines), flush=True)
    output.remark("ready; stop with Ctrl-C or `stillblock volume release`")


def status(*, common: Common = _COMMON) -> int:
    """Show what is served, to whom, how far work on it is, and full stores (exit code 3)."""
    from stillblock.cli.restore import describe  # noqa: PLC0415
    from stillblock.cli.upkeep import describe as describe_verification  # noqa: PLC0415
    from stillblock.operations import usage  # noqa: PLC0415
    from stillblock.operations.registry import open_catalog  # noqa: PLC0415
    from stillblock.service.client import RemoteSession, find_server  # noqa: PLC0415

    output, config = Output(common), common.config()
    with open_catalog(config) as catalog:
        known = catalog.volumes()
    found: list[dict[str, object]] = []
    rows: list[tuple[str, ...]] = []
    remarks: list[str] = []
    code = ExitCode.OK
    for entry in known:
        socket_path = find_server(config, entry.name)
        if socket_path is None:
            stopped = {
                "is_served": False,
                "exports": [],
                "restore": None,
                "verification": None,
                "store": None,
                "clones": None,
            }
            found.append({"name": entry.name, **stopped})
            rows.append((entry.name, "stopped", "", ""))
            continue
        session = RemoteSession(socket_path, entry.name)
        try:
            exports, restore = session.exports().exports, session.restore_status()
            verification = session.verification_status()
            store, clones = session.store_usage(), session.list_clones()
        except StillblockError as error:
            output.warn(f"{entry.name}: {error}")
            code = ExitCode.PARTIAL
            continue
        found.append(
            {
                "name": entry.name,
                "is_served": True,
                "exports": exports,
                "restore": restore,
                "verification": verification,
                "store": store,
                "clones": clones,
            }
        )
        rows += [(e.name, "served", str(e.connections), e.uri) for e in exports]
        remarks += [describe(restore)] if restore.is_running else []
        if clones.clones:
            taken = format_size(clones.stored_bytes)
            remarks.append(f"{entry.name}: {counted(len(clones.clones), 'clone')} take {taken}")
        remarks += [describe_verification(verification)] if verification.is_running else []
        if text := usage.describe(store):
            output.warn(text)
            code = ExitCode.PARTIAL

    def render(out: Output) -> None:
        out.table(("NAME", "STATE", ">CLIENTS", "URI"), rows, empty="no volumes yet")
        for remark in remarks:
            out.line(remark)

    output.result("status", {"volumes": found}, render)
    return code


def run(
    ref: SnapshotRef,
    /,
    *command: Annotated[str, Parameter(help="The command and its arguments, after --.")],
    no_image: bool = False,
    keep: bool = False,
    common: Common = _COMMON,
) -> int:
    """Rehearse: run a command on a throw-away clone of a snapshot; its exit code is ours.

    The command finds the clone as a file in $STILLBLOCK_IMAGE and its NBD URI in $STILLBLOCK_URI.
    Whatever it writes there, neither the snapshot nor the disk change. The clone is dropped when it
    ends, and how it ended is among the events.

    Parameters
    ----------
    no_image
        No file, the URI only: without FUSE.
    keep
        Keep the clone, and say its name.
    """
    from stillblock.service.rehearsal import rehearse  # noqa: PLC0415 - only to rehearse

    output = Output(common)
    volume, snapshot = snapshot_of(ref)
    if not command:
        raise UsageError("say what to run: stillblock run VOL@SNAP -- COMMAND")
    verdict = rehearse(
        common.config(), volume, snapshot, command, has_image=not no_image, is_kept=keep
    )
    if output.is_json:
        output.json("rehearsal", verdict)
    took = format_duration(verdict.duration_ms * 1_000_000)
    output.remark(
        f"{command[0]} ended with {verdict.exit_code} after {took} and wrote "
        f"{format_size(verdict.written_bytes)} to a clone of {volume}@{verdict.snapshot}"
        + (f", kept as {verdict.kept}" if verdict.kept else ", which is gone")
    )
    return verdict.exit_code


def events(
    volume: str | None = None,
    /,
    *,
    follow: bool = False,
    count: int = 100,
    common: Common = _COMMON,
) -> None:
    """Show what happened, one line an event.

    Parameters
    ----------
    volume
        Only of this volume.
    follow
        Go on as things happen.
    count
        How many of the newest to start with.
    """
    from stillblock.catalog import Catalog  # noqa: PLC0415

    output, config = Output(common), common.config()
    name = None if volume is None else volume_of(volume)
    with Catalog(config.catalog_path) as catalog:
        after_id, count_max = 0, count
        while True:
            for event in catalog.events(volume=name, after_id=after_id, count_max=count_max):
                after_id = event.id
                _show_event(output, event)
            if not follow:
                return
            count_max = 1000
            time.sleep(_FOLLOW_POLL_S)


def _show_event(output: Output, event: Event) -> None:
    detail = " ".join(f"{name}={value}" for name, value in event.detail.items())
    output.result(
        "event",
        event,
        lambda out: out.line(
            f"{format_instant(event.unix_ns)} {event.volume} {event.action} {detail}".rstrip()
        ),
    )


def doctor(*, repair: bool = False, common: Common = _COMMON) -> int:
    """Show what this system offers, and what is wrong with the state directory.

    Exit code 0: all is well, or only something useful is missing; 3: warnings; 1: something is
    broken.

    Parameters
    ----------
    repair
        First put right what can be without a doubt: a damaged catalog, stores that it does not
        list, sockets and write buffers that nobody needs.
    """
    from stillblock.operations.doctor import examine  # noqa: PLC0415
    from stillblock.operations.findings import Level  # noqa: PLC0415
    from stillblock.operations.state import repair_state  # noqa: PLC0415
    from stillblock.service.client import find_server  # noqa: PLC0415

    output, config = Output(common), common.config()

    def is_served(name: str) -> bool:
        return find_server(config, name) is not None

    repaired = repair_state(config, is_served) if repair else ()
    for done in repaired:
        output.remark(done)
    checks = examine(config, is_served)
    rows = [(str(check.level), check.name, check.finding, check.advice) for check in checks]
    output.result(
        "doctor",
        {"checks": checks, "repaired": repaired},
        lambda out: out.table(("", "CHECK", "FINDING", "WHAT TO DO"), rows, empty=""),
    )
    levels = {check.level for check in checks}
    if Level.BROKEN in levels:
        return ExitCode.FAILED
    return ExitCode.PARTIAL if Level.WARNING in levels else ExitCode.OK


def demo(*, keep: Path | None = None, common: Common = _COMMON) -> int:
    """See it work on a real filesystem, in half a minute and without root.

    Parameters
    ----------
    keep
        A directory to leave everything in.
    """
    import importlib  # noqa: PLC0415

    # By name: the demo uses the commands like a stranger and lies beside them, not below.
    run = importlib.import_module("stillblock.demo").main
    code = run(keep=keep, json=common.json, quiet=common.quiet)
    return int(code)


def completion(
    shell: Literal["bash", "zsh", "fish"], /, *, install: bool = False, common: Common = _COMMON
) -> None:
    """Print the completion script of a shell.

    Parameters
    ----------
    shell
        Which shell.
    install
        Put it where the shell finds it instead.
    """
    from stillblock.cli.app import build  # noqa: PLC0415

    if not install:
        print(build().generate_completion(prog_name="stillblock", shell=shell))
        return
    path = build().install_completion(shell=shell, add_to_startup=False)
    Output(common).line(str(path))
