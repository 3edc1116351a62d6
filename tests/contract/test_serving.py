"""What holds while a volume is served: exports follow snapshots, sockets come and go."""

import json
import socket
import stat

import pytest

from stillblock.errors import ControlError, LockedError, NotFoundError
from stillblock.operations.snapshots import SnapshotRequest
from stillblock.operations.volume import OpenVolume
from stillblock.service.client import RemoteSession, fetch, find_server
from stillblock.service.session import open_session
from stillblock.service.verbs import all_verbs


@pytest.fixture
def remote(host, config, volume):
    with open_session(config, volume) as session:
        yield session


def exports(session):
    return {export.name: export for export in session.exports().exports}


def test_exports_come_and_go_with_snapshots(remote):
    assert set(exports(remote)) == {"web"}
    remote.create_snapshot(SnapshotRequest(name="monday"))
    assert set(exports(remote)) == {"web", "web@monday"}
    assert exports(remote)["web@monday"].is_read_only
    remote.rename_snapshot("monday", name="first")
    assert set(exports(remote)) == {"web", "web@first"}
    remote.delete_snapshot("first")
    assert set(exports(remote)) == {"web"}


def test_contexts_follow_snapshots_and_bookmarks(remote):
    remote.create_snapshot(SnapshotRequest(name="a"))
    remote.create_bookmark("a", name="mark")
    remote.create_snapshot(SnapshotRequest(name="b"))
    assert "qemu:dirty-bitmap:b" in exports(remote)["web"].contexts
    assert exports(remote)["web@a"].contexts == ("x-stillblock:selected",)
    remote.delete_snapshot("a")
    contexts = exports(remote)["web@b"].contexts
    assert "x-stillblock:changed:mark" in contexts
    assert "x-stillblock:changed:a" not in contexts


def test_an_export_that_nobody_reads_does_not_count_as_use(remote):
    receipt = remote.create_snapshot(SnapshotRequest(name="monday"))
    assert receipt.snapshot.holders == 0


def test_sockets_are_private_and_gone_after_a_release(remote, host, config):
    paths = [*host.ready().nbd_sockets, *host.ready().control_sockets]
    assert len(paths) == 2
    for path in map(config.run_dir.joinpath, paths):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    remote.release()
    assert find_server(config, "web") is None


def test_a_served_volume_is_not_opened_twice(remote, config):
    with pytest.raises(LockedError):
        OpenVolume.open(config, "web")


def test_a_socket_left_by_a_dead_process_is_cleaned_away(config, volume):
    path = config.control_socket(volume)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    assert find_server(config, volume) is None
    assert not path.exists()


def test_a_process_that_is_gone_is_a_control_error(config, volume):
    session = RemoteSession(config.control_socket(volume), volume)
    with pytest.raises(ControlError, match="did not answer"):
        session.show_volume()


def test_the_index_lists_every_verb(remote, config):
    index = fetch(config.control_socket("web"), "GET", "/v1")
    assert isinstance(index, dict)
    assert index["schema"] == "stillblock/1"
    named = [route["name"] for route in index["routes"]]
    of_volumes = [verb.name for verb in all_verbs()]
    assert sorted(named) == sorted([*of_volumes, "create_group", "plan_group"])


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("GET", "/v1/volumes/data", None, "not_found"),
        ("GET", "/v1/nonsense", None, "not_found"),
        ("POST", "/v1/volumes/web/snapshots", b"{", "usage"),
        ("POST", "/v1/volumes/web/snapshots", b"[]", "usage"),
        ("POST", "/v1/volumes/web/snapshots", b'{"name": 5}', "usage"),
        ("POST", "/v1/volumes/web/snapshots", b'"' + b"x" * 2_000_000 + b'"', "usage"),
        ("GET", "/v1/volumes/web/changes?sinse=a", None, "usage"),
        ("DELETE", "/v1/volumes/web/snapshots/none?force=maybe", None, "usage"),
    ],
)
def test_a_bad_request_is_answered_with_its_reason(remote, config, *, method, path, body, code):
    with pytest.raises(Exception, match=r".") as caught:
        fetch(config.control_socket("web"), method, path, body=body)
    assert getattr(caught.value, "code", None) == code


def test_events_are_streamed_as_json_lines(remote, config):
    remote.create_snapshot(SnapshotRequest(name="monday"))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(config.control_socket("web")))
        client.sendall(b"GET /v1/events HTTP/1.0\r\n\r\n")
        reply = b"".join(iter(lambda: client.recv(65536), b""))
    lines = [json.loads(line) for line in reply.split(b"\r\n\r\n", 1)[1].splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds == ["event"] * len(lines)
    assert b"snapshot_created" in reply


def test_a_missing_snapshot_is_the_same_error_as_at_home(remote):
    with pytest.raises(NotFoundError, match="nope"):
        remote.delete_snapshot("nope")
