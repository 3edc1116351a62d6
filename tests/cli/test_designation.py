"""Rules about files on the command line: what is said, waited for, and shown."""

from __future__ import annotations

import pytest

from disks import ext4_disk

pytestmark = pytest.mark.needs("mkfs.ext4")


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    return ext4_disk(tmp_path_factory.mktemp("disk"))[0]


@pytest.fixture
def web(run, disk, tmp_path):
    origin = tmp_path / "disk.img"
    origin.write_bytes(disk.read_bytes())
    ran = run("volume", "add", "web", "--origin", str(origin))
    assert ran.code == 0
    assert "free space and swap are left out" in ran.out
    return origin


def test_the_default_is_said_at_every_creation_and_how_to_switch_it_off(run, web):
    ran = run("snapshot", "create", "web@a")
    assert ran.code == 0
    assert "rules set web --all" in ran.err
    assert "left out" in ran.out
    assert "default" in run("snapshot", "receipt", "web@a").out
    assert "rules set web --all" in run("rules", "show", "web").out
    assert run("rules", "set", "web", "--all").code == 0
    ran = run("snapshot", "create", "web@b")
    assert "100 %" in ran.out
    assert ran.err == ""


def test_a_preset_stands_for_its_terms_in_their_place(run, web):
    words = ["--preset", "linux-vm", "--include", "path:/var/cache/apt"]
    ran = run("rules", "set", "web", *words, "--json")
    terms = [(t["include"], t["text"]) for t in ran.json["rules"]]
    assert (False, "path:/var/cache/**") in terms
    assert terms[-1] == (True, "path:/var/cache/apt")
    assert not any("preset" in text for _, text in terms)
    assert "linux-vm" in run("rules", "presets").out
    ran = run("rules", "set", "web", "--preset", "nothing")
    assert ran.code == 2
    assert "linux-vm" in ran.err


def test_a_preset_of_ones_own_is_a_file_in_the_state_directory(run, web, state):
    (state / "presets").mkdir()
    (state / "presets" / "mine.toml").write_text('terms = ["exclude path:/var/cache/**"]\n')
    found = run("rules", "explain", "web", "--preset", "mine", "--json").json
    assert [(t["text"], t["file_count"]) for t in found["terms"]] == [("path:/var/cache/**", 41)]


def test_the_receipt_tells_files_and_why(run, web):
    words = ["--exclude", "path:/var/cache/**", "--exclude", "path:/nothing/here"]
    assert run("snapshot", "create", "web@a", *words).code == 0
    told = run("snapshot", "receipt", "web@a").out
    assert "What is not in this snapshot, and why:" in told
    assert "FILES" in told
    assert "41" in told
    assert "sha256:" in told
    receipt = run("snapshot", "receipt", "web@a", "--json").json
    assert receipt["is_intact"]
    assert [t["file_count"] for t in receipt["terms"]] == [41, 0]
    assert run("snapshot", "list", "web", "--json").json["snapshots"][0]["state"] == "ok"


def test_without_waiting_the_snapshot_is_final_at_the_latest_at_the_next_command(run, web):
    ran = run("snapshot", "create", "web@a", "--no-wait", "--exclude", "free", "--json")
    assert ran.json["snapshot"]["state"] == "narrowing"
    assert run("restore", "run", "web@a", "--dry-run").code == 0
    (found,) = run("snapshot", "list", "web", "--json").json["snapshots"]
    assert found["state"] == "ok"


def test_a_forecast_names_terms_to_use_and_takes_no_others(run, web):
    assert "take a snapshot" in run("rules", "explain", "web", "--forecast").out
    assert run("snapshot", "create", "web@a").code == 0
    assert run("rules", "explain", "web", "--forecast", "--json").json["instant_count"] == 1
    assert run("rules", "explain", "web", "--forecast", "--exclude", "free").code == 2


def test_a_dry_run_says_that_it_is_an_upper_bound(run, web):
    ran = run("snapshot", "create", "web@a", "--dry-run", "--exclude", "free")
    assert ran.code == 0
    assert "at most" in ran.out
    assert run("snapshot", "list", "web", "--json").json["snapshots"] == []
