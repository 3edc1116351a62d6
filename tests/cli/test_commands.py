"""The command line: results, JSON, exit codes, questions."""

import json
import subprocess
import sys

import pytest

MIB = 1024 * 1024


def test_a_volume_is_added_listed_and_shown(run, web):
    listed = run("volume", "list")
    assert listed.code == 0
    assert "web   stopped  1 MiB" in listed.out
    shown = run("volume", "show", "web", "--json").json
    assert (shown["schema"], shown["kind"]) == ("stillblock/1", "volume")
    assert shown["volume"]["origin"] == str(web)
    assert shown["volume"]["size_bytes"] == MIB


def test_a_dry_run_adds_nothing(run, state, tmp_path):
    (tmp_path / "d.img").write_bytes(bytes(8192))
    ran = run("volume", "add", "web", "--origin", "d.img", "--dry-run")
    assert ran.out.startswith("would add web")
    assert run("volume", "list", "--json").json["volumes"] == []


def test_an_image_that_is_not_raw_is_refused_with_its_conversion(run, tmp_path):
    (tmp_path / "d.qcow2").write_bytes(b"QFI\xfb\x00\x00\x00\x03" + bytes(4088))
    ran = run("volume", "add", "web", "--origin", "d.qcow2")
    assert ran.code == 1
    assert "qemu-img convert -f qcow2 -O raw" in ran.err


def test_the_same_disk_is_not_added_twice(run, web, tmp_path):
    (tmp_path / "alias.img").symlink_to(web)
    ran = run("volume", "add", "other", "--origin", "alias.img")
    assert ran.code == 1
    assert "origin of volume web" in ran.err


def test_a_store_that_holds_something_is_refused(run, web, tmp_path):
    other = tmp_path / "other.img"
    other.write_bytes(bytes(8192))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    ran = run("volume", "add", "other", "--origin", str(other), "--store", "full")
    assert ran.code == 1
    assert "not empty" in ran.err


def test_terms_keep_the_order_they_were_written_in(run, web):
    words = ("--exclude", "64K-128K", "--include", "96K-128K", "--exclude", "0-4K")
    plan = run("snapshot", "create", "web@a", *words, "--dry-run", "--json").json
    texts = [(term["include"], term["text"]) for term in plan["terms"]]
    assert texts == [(False, "64K-128K"), (True, "96K-128K"), (False, "0-4K")]
    assert plan["extents"] == [[4096, 65536], [98304, MIB]]


def test_a_snapshot_is_taken_listed_compared_and_deleted(run, web):
    taken = run("snapshot", "create", "web@monday", "--exclude", "0-512K")
    assert taken.code == 0
    assert "web@monday taken" in taken.out
    assert "left out 512 KiB: 0-512K" in taken.out
    assert "web@monday" in run("snapshot", "list").out
    assert run("snapshot", "show", "web@monday", "--json").json["snapshot"]["name"] == "monday"
    assert run("snapshot", "receipt", "web@monday", "--json").json["pause_ns"] >= 0
    assert run("snapshot", "diff", "web@monday", "--json").json["changed_bytes"] == 0
    assert run("snapshot", "rename", "web@monday", "first").out == "web@first\n"
    assert run("snapshot", "delete", "web@first", "--yes").out.startswith("deleted web@first")
    assert run("snapshot", "list", "web", "--json").json["snapshots"] == []


def test_deleting_asks_and_without_a_terminal_needs_yes(run, web):
    run("snapshot", "create", "web@monday")
    ran = run("snapshot", "delete", "web@monday")
    assert ran.code == 2
    assert "--yes" in ran.err
    assert run("snapshot", "delete", "web@monday", "--dry-run").code == 0
    assert len(run("snapshot", "list", "--json").json["snapshots"]) == 1


def test_a_protected_snapshot_stays(run, web):
    run("snapshot", "create", "web@monday")
    assert run("snapshot", "protect", "web@monday").code == 0
    assert run("snapshot", "delete", "web@monday", "--yes").code == 1
    assert run("snapshot", "protect", "web@monday", "--off").code == 0
    assert run("snapshot", "delete", "web@monday", "--yes").code == 0


def test_rules_are_set_shown_and_explained(run, web):
    assert run("rules", "set", "web", "--exclude", "0-64K").code == 0
    assert "exclude 0-64K" in run("rules", "show", "web").out
    assert run("rules", "add", "web", "--exclude", "64K-128K").code == 0
    found = run("rules", "explain", "web", "--json").json
    assert found["extents"] == [[131072, MIB]]
    assert run("rules", "set", "web", "--all").code == 0
    assert [t["text"] for t in run("rules", "show", "web", "--json").json["rules"]] == ["all"]
    assert run("rules", "set", "web", "--default").code == 0
    assert run("rules", "show", "web", "--json").json["rules"] == []
    assert run("rules", "set", "web").code == 2
    assert run("rules", "set", "web", "--all", "--default").code == 2


def test_a_term_that_means_nothing_is_a_usage_error_that_names_it(run, web):
    ran = run("snapshot", "create", "web", "--include", "part:9")
    assert ran.code == 2
    assert "part:9" in ran.err


def test_a_restore_prints_json_lines_and_can_be_undone(run, web):
    run("snapshot", "create", "web@monday")
    ran = run("restore", "run", "web@monday", "--yes", "--json")
    assert ran.code == 0
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert lines[0]["kind"] == "restore-plan"
    assert lines[-1]["kind"] == "restore-progress"
    assert lines[-1]["is_running"] is False
    assert run("restore", "status", "web").out == "no restore runs on web\n"
    names = [s["name"] for s in run("snapshot", "list", "--json").json["snapshots"]]
    assert names[0] == "monday"
    assert names[1].startswith("before-restore-")


def test_bookmarks_are_made_listed_and_deleted(run, web):
    run("snapshot", "create", "web@monday")
    assert run("bookmark", "create", "web@monday", "mark").code == 0
    assert "web@mark" in run("bookmark", "list", "web").out
    assert run("bookmark", "delete", "web@mark", "--yes").code == 0


def test_a_lost_catalog_is_rebuilt_from_the_store(run, web, state):
    run("snapshot", "create", "web@monday")
    for path in state.glob("catalog.sqlite*"):
        path.unlink()
    # A store in the state directory is found again by itself; one elsewhere is imported.
    assert "web@monday" in run("snapshot", "list", "web").out
    assert run("volume", "remove", "--keep-store", "web", "--yes").code == 0
    assert run("volume", "show", "web").code == 1
    assert run("volume", "import", str(state / "stores" / "web")).code == 0
    assert "web@monday" in run("snapshot", "list", "web").out


def test_removing_a_volume_keeps_the_origin(run, web, state):
    before = web.read_bytes()
    assert run("volume", "remove", "web").code == 2
    assert run("volume", "remove", "web", "--yes").code == 0
    assert web.read_bytes() == before
    assert not (state / "stores" / "web").exists()
    assert run("volume", "list", "--json").json["volumes"] == []


def test_events_tell_what_happened(run, web):
    run("snapshot", "create", "web@monday")
    lines = [json.loads(line) for line in run("events", "web", "--json").out.splitlines()]
    assert [line["action"] for line in lines] == ["volume_added", "snapshot_created"]


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("snapshot", "creat", "web"),
        ("snapshot", "create"),
        ("snapshot", "create", "we b"),
        ("snapshot", "show", "web"),
        ("volume", "show", "web@monday"),
        ("volume", "add", "web"),
        ("volume", "recover", "web"),
        ("volume", "recover", "web", "--replay", "--discard"),
        ("volume", "add", "web", "--origin", "x", "--block-size", "4X"),
        ("volume", "list", "--nonsense"),
        ("serve",),
        ("serve", "web", "--listen", "0.0.0.0:1"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(run, words):
    ran = run(*words)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("stillblock: ")
    assert ran.err.count("\n") == 1


def test_an_error_is_json_too(run, state):
    ran = run("volume", "show", "nope", "--json")
    error = json.loads(ran.err)
    assert ran.code == 1
    assert error["kind"] == "error"
    assert error["error"]["code"] == "not_found"


def test_a_defect_is_one_line_that_names_the_log(run, state, monkeypatch):
    monkeypatch.setattr("stillblock.operations.volumes.list_volumes", lambda *_: 1 / 0)
    ran = run("volume", "list")
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert str(state / "stillblock.log") in ran.err
    assert "ZeroDivisionError" in (state / "stillblock.log").read_text()


def test_an_interrupt_is_exit_code_130(run, state, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("stillblock.operations.volumes.list_volumes", interrupted)
    assert run("volume", "list").code == 130


def test_doctor_reports_without_a_volume(run, state):
    checks = run("doctor", "--json").json["checks"]
    assert {"catalog", "state directory"} <= {check["name"] for check in checks}


def test_completion_scripts_name_the_commands(run, state):
    for shell in ("bash", "zsh", "fish"):
        ran = run("completion", shell)
        assert ran.code == 0
        assert "snapshot" in ran.out


def test_help_imports_neither_the_core_nor_a_server():
    code = (
        "import sys; from stillblock.cli import main; main(['--help']);"
        "sys.exit(any(m in sys.modules for m in"
        " ('stillblock._native', 'uvicorn', 'starlette', 'asyncio', 'sqlite3')))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert "snapshot" in ran.stdout
