"""Which contexts an export offers, its URIs, and how to attach it."""

import xml.etree.ElementTree as ET

import pytest

from stillblock.errors import SocketPathError, UsageError
from stillblock.service.attachments import attachment
from stillblock.service.exports import (
    Instant,
    contexts_of_snapshot,
    contexts_of_volume,
    tcp_uri,
    unix_uri,
)
from stillblock.service.serve import TcpListener, UnixListener, parse_listener

INSTANTS = (Instant(name="mon", epoch=1), Instant(name="tue", epoch=4))


def test_the_live_disk_shows_what_changed_since_every_instant():
    assert contexts_of_volume(INSTANTS) == [
        ("x-stillblock:changed:mon", "changed", 1),
        ("qemu:dirty-bitmap:mon", "dirty", 1),
        ("x-stillblock:changed:tue", "changed", 4),
        ("qemu:dirty-bitmap:tue", "dirty", 4),
    ]


def test_a_snapshot_shows_its_selection_and_what_changed_since_older_instants_only():
    assert contexts_of_snapshot(1, INSTANTS) == [("x-stillblock:selected", "selected", 0)]
    assert contexts_of_snapshot(4, INSTANTS) == [
        ("x-stillblock:selected", "selected", 0),
        ("x-stillblock:changed:mon", "changed", 1),
        ("qemu:dirty-bitmap:mon", "dirty", 1),
    ]


def test_uris_can_be_pasted():
    assert unix_uri("web@mon", "/run/my dir/w.nbd") == (
        "nbd+unix:///web@mon?socket=/run/my%20dir/w.nbd"
    )
    assert tcp_uri("web", "127.0.0.1", 10809) == "nbd://127.0.0.1:10809/web"
    assert tcp_uri("web", "::1", 1) == "nbd://[::1]:1/web"


def test_every_attachment_names_the_export_and_the_socket():
    for kind in ("qemu", "libvirt", "nbd-client", "nbdfuse"):
        text = attachment(kind, export="web", socket_path="/run/w.nbd")
        assert "web" in text
        assert "/run/w.nbd" in text


def test_attachments_survive_awkward_paths():
    path = "/run/a,b & 'c'/w.nbd"
    assert "a,,b" in attachment("qemu", export="web", socket_path=path)
    disk = ET.fromstring(attachment("libvirt", export="web", socket_path=path))
    host = disk.find("source/host")
    assert host is not None
    assert host.get("socket") == path


def test_listeners_are_paths_or_loopback_ports():
    assert parse_listener("127.0.0.1:10809") == TcpListener(host="127.0.0.1", port=10809)
    assert parse_listener("tcp:[::1]:0") == TcpListener(host="::1", port=0)
    assert parse_listener(":0") == TcpListener(host="127.0.0.1", port=0)
    unix = parse_listener("unix:/run/w.nbd")
    assert isinstance(unix, UnixListener)
    assert str(unix.path) == "/run/w.nbd"


@pytest.mark.parametrize("text", ["0.0.0.0:10809", "example.org:1", "web", "127.0.0.1:99999", ""])
def test_other_listeners_are_refused(text):
    with pytest.raises(UsageError):
        parse_listener(text)


def test_a_listener_path_that_is_too_long_is_refused():
    with pytest.raises(SocketPathError):
        parse_listener("/" + "x" * 200)
