"""The serve process as a user meets it."""

import json
import os
import signal

import pytest


def test_serve_prints_uris_and_other_commands_reach_it(run, web, serving, state):
    with serving("web") as (process, lines):
        assert lines == [f"nbd+unix:///web?socket={state}/run/web.nbd"]
        assert run("snapshot", "create", "web@monday").code == 0
        shown = run("status").out
        assert "web@monday" in shown
        assert "served" in shown
        assert "released web" in run("volume", "release", "web").out
        assert process.wait(timeout=20) == 0
    assert "stopped" in run("volume", "list").out
    assert "web@monday" in run("snapshot", "list").out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly(run, web, serving, state, number):
    with serving("web") as (process, _):
        os.kill(process.pid, number)
        assert process.wait(timeout=20) == 0
    assert list((state / "run").iterdir()) == []
    assert run("volume", "show", "web").code == 0


def test_ready_is_one_json_line(run, web, serving):
    with serving("web", "--json", "--print", "nbdfuse") as (_, lines):
        ready = json.loads(lines[0])
        assert ready["kind"] == "ready"
        assert [export["name"] for export in ready["serve"]["exports"]] == ["web"]
        assert ready["attachments"]["web"].startswith("mkdir -p mnt && nbdfuse")


def test_tcp_is_served_on_loopback(run, web, serving):
    with serving("web", "--listen", "127.0.0.1:0", "--json") as (_, lines):
        serve = json.loads(lines[0])["serve"]
        assert serve["exports"][0]["uri"] == f"nbd://127.0.0.1:{serve['tcp_ports'][0]}/web"


def test_several_volumes_share_a_process_and_leave_one_by_one(run, web, serving, tmp_path):
    (tmp_path / "data.img").write_bytes(bytes(65536))
    run("volume", "add", "data", "--origin", "data.img")
    with serving("web", "data") as (process, _):
        assert run("volume", "release", "web").code == 0
        assert process.poll() is None
        assert run("snapshot", "create", "web@home").code == 0
        assert run("snapshot", "create", "data@there").code == 0
        assert run("volume", "release", "data").code == 0
        assert process.wait(timeout=20) == 0


def test_a_served_volume_cannot_be_served_again(run, web, serving):
    with serving("web"):
        ran = run("serve", "web")
        assert ran.code == 11
        assert "stillblock status" in ran.err


def test_a_killed_server_leaves_a_volume_that_says_how_to_recover(run, web, serving):
    with serving("web") as (process, _):
        process.kill()
        process.wait(timeout=20)
    ran = run("volume", "recover", "web", "--replay", "--yes")
    assert ran.code == 0
    assert "complete" in ran.out
    assert run("volume", "show", "web").code == 0
