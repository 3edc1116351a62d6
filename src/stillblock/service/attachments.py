"""How to attach a served disk: a line to paste for each kind of client."""

from __future__ import annotations

import shlex
from typing import Literal
from xml.sax.saxutils import quoteattr

from stillblock.service.exports import unix_uri

AttachmentKind = Literal["qemu", "libvirt", "nbd-client", "nbdfuse"]

_RECONNECT_S = 30
"""How long a client holds requests while the server is away; longer than a restart takes."""


def attachment(kind: AttachmentKind, *, export: str, socket_path: str) -> str:
    """Return what to paste to attach an export on a Unix socket."""
    match kind:
        case "qemu":
            return _qemu(export, socket_path)
        case "libvirt":
            return _libvirt(export, socket_path)
        case "nbd-client":
            return shlex.join(
                ["nbd-client", "-unix", socket_path, "/dev/nbd0", "-name", export, "-persist"]
            )
        case "nbdfuse":
            uri = unix_uri(export, socket_path)
            return f"mkdir -p mnt && {shlex.join(['nbdfuse', f'mnt/{export}.img', uri])}"


def _qemu(export: str, socket_path: str) -> str:
    # A comma inside a value of a qemu option is written twice.
    path = socket_path.replace(",", ",,")
    blockdev = (
        f"driver=nbd,node-name=stillblock0,export={export},server.type=unix,"
        f"server.path={path},reconnect-delay={_RECONNECT_S},discard=unmap"
    )
    device = "virtio-blk-pci,drive=stillblock0"
    return f"-blockdev {shlex.quote(blockdev)} -device {device}"


def _libvirt(export: str, socket_path: str) -> str:
    return "\n".join(
        (
            "<disk type='network' device='disk'>",
            "  <driver name='qemu' type='raw' cache='none' discard='unmap'/>",
            f"  <source protocol='nbd' name={quoteattr(export)}>",
            f"    <host transport='unix' socket={quoteattr(socket_path)}/>",
            f"    <reconnect delay='{_RECONNECT_S}'/>",
            "  </source>",
            "  <target dev='vda' bus='virtio'/>",
            "</disk>",
        )
    )
