"""The demo: its parts against the field's own tools, and the whole of it as a user runs it."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from processes import wait_until
from stillblock.demo import comparison, disk, edits, main, narration
from stillblock.demo.nbd_client import NbdClient, NbdError

MIB = 1 << 20
BLOCK = comparison.BLOCK_BYTES
DISK_BYTES = 64 * MIB


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small disk of the demo's kind with a handful of files: folder, swap, filesystem."""
    folder = tmp_path_factory.mktemp("disk")
    for number in range(120):
        file = folder / "files" / f"d{number % 3}" / f"f{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {number}\n" * (number + 1))
    swap, filesystem = disk.make_disk(
        folder / "disk.img", size_bytes=DISK_BYTES, files=folder / "files", seed=1
    )
    return folder, swap, filesystem


def is_listening(path):
    """Whether the kernel knows a socket of this path that takes connections."""
    sockets = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return any(words[-1] == str(path) and words[3] == "00010000" for words in sockets)


@pytest.fixture
def served(made, tmp_path, require_tool):
    """The disk behind qemu's own NBD server, on a copy: socket and image."""
    image, socket = tmp_path / "disk.img", tmp_path / "nbd.sock"
    subprocess.run(["cp", made[0] / "disk.img", image], check=True)
    server = subprocess.Popen(
        [require_tool("qemu-nbd"), "-t", "-f", "raw", "-x", "web", "-k", socket, image]
    )
    # The path is there before connections are taken; one to try would be the one that it takes.
    assert wait_until(lambda: server.poll() is not None or is_listening(socket))
    assert server.poll() is None
    yield str(socket), image
    server.terminate()
    server.wait()


@pytest.mark.needs("sfdisk", "mkfs.ext4")
def test_sfdisk_reads_the_partition_table_as_it_was_meant(made):
    folder, swap, filesystem = made
    image = folder / "disk.img"
    shown = subprocess.run(["sfdisk", "-J", image], check=True, capture_output=True, text=True)
    table = json.loads(shown.stdout)["partitiontable"]
    found = [
        (entry["name"], entry["type"].lower(), entry["start"] * 512, entry["size"] * 512)
        for entry in table["partitions"]
    ]
    assert found == [
        (part.name, str(part.kind), part.start, part.size_bytes) for part in (swap, filesystem)
    ]
    verdict = subprocess.run(["sfdisk", "-V", image], check=True, capture_output=True, text=True)
    assert "No errors detected" in verdict.stdout


@pytest.mark.needs("blkid", "mkfs.ext4")
@pytest.mark.parametrize(("index", "kind"), [(1, "swap"), (2, "ext4")])
def test_blkid_recognises_what_is_in_each_partition(made, index, kind):
    folder, offset = made[0], made[index].start
    shown = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "TYPE", "-O", str(offset), folder / "disk.img"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == kind


@pytest.mark.needs("mkfs.ext4", "debugfs", "e2fsck")
def test_a_bad_day_leaves_a_sound_filesystem_and_touches_nothing_else(made, tmp_path):
    folder, _, filesystem = made
    work = tmp_path / "work.img"
    subprocess.run(["cp", folder / "disk.img", work], check=True)
    day = edits.plan_edits(folder / "files", seed=2)

    edits.apply_edits(
        day,
        image=work,
        partition=filesystem,
        files=folder / "files",
        script=tmp_path / edits.SCRIPT,
        seed=2,
    )

    inside = edits.image_at(str(work), filesystem)
    subprocess.run(["e2fsck", "-fn", inside], check=True, capture_output=True)
    listing = edits.run_debugfs(
        ["ls -p /", "ls -p /d0", "ls -p /d1", "ls -p /d2"],
        image=inside,
        may_write=False,
        script_file=tmp_path / "look",
    )
    names = {line.split("/")[5] for line in listing.splitlines() if line.count("/") > 5}
    assert {name[1:] for name in day.written} <= names
    assert {name.rpartition("/")[2] for name in day.overwritten} <= names
    assert not {name.rpartition("/")[2] for name in day.deleted} & names
    outside = comparison.differing_blocks(folder / "disk.img", work, start=0, end=filesystem.start)
    assert list(outside) == []


@pytest.mark.needs("debugfs", "mkfs.ext4")
def test_a_complaint_of_debugfs_is_an_error(made, tmp_path):
    inside = edits.image_at(str(made[0] / "disk.img"), made[2])
    with pytest.raises(RuntimeError, match="debugfs failed"):
        edits.run_debugfs(
            ["dump /nothing here"], image=inside, may_write=False, script_file=tmp_path / "look"
        )


@pytest.mark.needs("qemu-nbd")
def test_the_client_reads_writes_and_flushes_at_a_stock_server(served):
    socket, image = served
    data = os.urandom(3 * MIB + 513)  # more than one request, no whole number of sectors
    with NbdClient(socket_path=socket, export="web") as client:
        assert client.size_bytes == DISK_BYTES
        assert not client.is_read_only
        client.pwrite(data, offset=MIB + 1)
        client.flush()
        assert client.pread(offset=MIB + 1, length=len(data)) == data
        assert client.pread(offset=0, length=MIB + 1) == image.read_bytes()[: MIB + 1]
    assert image.read_bytes()[MIB + 1 :].startswith(data)


@pytest.mark.needs("qemu-nbd")
def test_the_client_says_which_export_was_refused(served):
    with pytest.raises(NbdError, match="monday"):
        NbdClient(socket_path=served[0], export="web@monday")


@pytest.mark.needs("qemu-nbd")
def test_the_client_says_which_request_failed(served):
    with (
        NbdClient(socket_path=served[0], export="web") as client,
        pytest.raises(NbdError, match=f"read of 512 at {DISK_BYTES}"),
    ):
        client.pread(offset=DISK_BYTES, length=512)


@hypothesis.given(blocks=st.sets(st.integers(0, 599)), data=st.data())
def test_differing_blocks_are_exactly_those_that_differ(tmp_path_factory, blocks, data):
    folder = tmp_path_factory.mktemp("pair")
    before, after = folder / "before", folder / "after"
    content = bytearray(600 * BLOCK)
    before.write_bytes(content)
    for block in blocks:
        content[block * BLOCK + data.draw(st.integers(0, BLOCK - 1))] = 1
    after.write_bytes(content)

    extents = list(comparison.differing_blocks(before, after, start=0, end=len(content)))

    found = {b for start, end in extents for b in range(start // BLOCK, end // BLOCK)}
    assert found == blocks
    assert comparison.block_count(extents) == len(blocks)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(extents))


@pytest.mark.parametrize("position", [0, 1, MIB - 1, MIB, 2 * MIB + 7])
def test_the_first_difference_is_named_to_the_byte(position):
    wanted = bytes(3 * MIB)
    found = bytearray(wanted)
    found[position] = 1
    found[-1] = 1
    wrong = comparison.first_difference(
        lambda start, end: bytes(found[start:end]),
        lambda start, end: wanted[start:end],
        start=0,
        end=len(wanted),
    )
    assert wrong == position


def test_a_source_that_ends_early_is_a_difference():
    wrong = comparison.first_difference(
        lambda start, end: bytes(min(end, 1000) - start),
        lambda start, end: bytes(end - start),
        start=0,
        end=4096,
    )
    assert wrong == 1000


def test_equal_sources_have_no_difference_and_zeroed_ones_are_equal_outside():
    ones = b"\1" * (2 * MIB)
    read = lambda start, end: ones[start:end]  # noqa: E731 - a source of bytes
    cut = comparison.zeroed(read, start=MIB - 5, end=MIB + 5)
    assert comparison.first_difference(read, read, start=0, end=len(ones)) is None
    assert comparison.first_difference(read, cut, start=0, end=len(ones)) == MIB - 5
    assert comparison.first_difference(read, cut, start=MIB + 5, end=len(ones)) is None
    assert cut(MIB - 5, MIB + 5) == bytes(10)


def test_a_command_is_shown_as_it_would_be_typed():
    assert narration.typed(["cp", "a.img", "b.img"]) == "cp a.img b.img"
    assert narration.typed(["nbdinfo", "nbd+unix:///a?b"]) == "nbdinfo 'nbd+unix:///a?b'"


def test_without_mkfs_the_demo_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(disk.shutil, "which", lambda *_, **__: None)
    assert main(quiet=True) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "apt-get install e2fsprogs" in captured.err


def test_a_directory_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert main(keep=tmp_path, quiet=True) == 1
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.needs("mkfs.ext4", "debugfs", "e2fsck", "nbdcopy", "nbdinfo")
def test_the_whole_demo_holds(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "stillblock", "demo", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    outcome = json.loads(ran.stdout)
    assert outcome["ok"]
    assert len(outcome["proofs"]) == 14
    assert 0 < outcome["blocks_preserved"] <= outcome["blocks_changed_selected"]
    assert list(tmp_path.iterdir()) == []
