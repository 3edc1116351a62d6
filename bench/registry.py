"""Which servers there are and which of them can be measured here."""

import sys
from collections.abc import Iterable

from bench import peers
from bench.errors import MissingToolError, UsageError
from bench.stillblock_target import Stillblock
from bench.targets import Place, Role, Target, TargetName

SERVERS: dict[str, type[Target]] = {
    "stillblock": Stillblock,
    "qemu-nbd": peers.QemuNbd,
    "qsd-raw": peers.StorageDaemon,
    "qsd-cbw": peers.CopyBeforeWrite,
    "nbdkit": peers.Nbdkit,
}

OURS = "stillblock"
OURS_RAW, OURS_HALF, OURS_SEVERAL = f"{OURS}@raw", f"{OURS}@half", f"{OURS}@k8"
OURS_BOOKMARK = f"{OURS}@bookmark"
QSD_RAW, QSD_CBW, QSD_CBW_HALF = "qsd-raw", "qsd-cbw", "qsd-cbw@half"
QEMU_NBD, NBDKIT = "qemu-nbd", "nbdkit"

DEFAULT_TARGETS = (
    *(QSD_RAW, QEMU_NBD, NBDKIT, QSD_CBW, QSD_CBW_HALF),
    *(OURS_RAW, OURS, OURS_HALF, OURS_BOOKMARK, OURS_SEVERAL),
)


def parse(name: str) -> TargetName:
    """The server and its role; raise UsageError for a name nobody has or a role it cannot play."""
    server = name.partition("@")[0]
    if server not in SERVERS:
        raise UsageError(f"{name}: no such target; there are {', '.join(SERVERS)}")
    kind = SERVERS[server]
    parsed = TargetName.parse(name, plain_role=kind.plain_role)
    if kind.plain_role is Role.RAW and parsed.role is not Role.RAW:
        raise UsageError(f"{name}: {server} takes no snapshots")
    return parsed


def make(name: str, *, place: Place) -> Target:
    """A target, not yet started."""
    parsed = parse(name)
    return SERVERS[parsed.server](parsed, place=place)


def raw_name_of(name: str, present: Iterable[str]) -> str | None:
    """The same server without a snapshot, if present and not the target itself."""
    server = name.partition("@")[0]
    own = QSD_RAW if server == QSD_CBW else f"{server}@raw"
    return own if own != name and own in set(present) else None


def available(names: Iterable[str]) -> list[str]:
    """The targets whose programs are installed; say on stderr, one line each, which are left out
    and why."""
    found = []
    for name in names:
        parse(name)
        try:
            require(name)
        except MissingToolError as error:
            print(f"# {name}: left out: {error}", file=sys.stderr)
        else:
            found.append(name)
    return found


def require(name: str) -> None:
    """Raise MissingToolError if the target's program is not installed."""
    server = name.partition("@")[0]
    if server == OURS:
        Stillblock.command_prefix()
    elif server == QEMU_NBD:
        peers.tool("qemu-nbd", package="qemu-utils")
    elif server == NBDKIT:
        peers.tool("nbdkit", package="nbdkit")
    else:
        peers.qemu_storage_daemon()
