"""qemu-img and qemu-io: the tools that most images in this world pass through."""

from __future__ import annotations

import json

import pytest

from interop.conftest import CHANGED, EXCLUDED, ZEROED
from serving import BLOCK, MIB, pattern, run, try_run

pytestmark = [pytest.mark.needs("qemu-img", "qemu-io"), pytest.mark.slow]


def image_options(served, snapshot=None, **more):
    """A `json:` file name: what a client without a word for a URI is given."""
    export = served.name if snapshot is None else f"{served.name}@{snapshot}"
    server = {"type": "unix", "path": served.socket}
    file = {"driver": "nbd", "export": export, "server": server, **more}
    return "json:" + json.dumps({"driver": "raw", "file": file})


def io(uri, *commands):
    """Run qemu-io commands; each has to succeed. qemu-io ends well whatever its commands do."""
    words = [word for command in commands for word in ("-c", command)]
    ran = run("qemu-io", "-f", "raw", *words, uri)
    text = ran.out + ran.err
    assert "failed" not in text, text
    assert "rror" not in text, text
    return text


def qemu_map(name):
    return [
        (e["start"], e["start"] + e["length"], e["data"], e["zero"], e["present"])
        for e in json.loads(run("qemu-img", "map", "--output=json", name).out)
    ]


@pytest.mark.parametrize("export", [None, "monday", "tuesday"])
def test_info_knows_the_size_and_takes_the_disk_for_raw(week, export):
    served, _ = week
    info = json.loads(run("qemu-img", "info", "--output=json", served.uri(export)).out)
    assert info["virtual-size"] == 4 * MIB
    assert info["format"] == "raw"


def test_map_shows_what_a_snapshot_leaves_out_as_zero(week):
    served, _ = week
    data = [extent[:4] for extent in qemu_map(served.uri("monday"))]
    assert data == [
        (0, EXCLUDED.start, True, False),
        (EXCLUDED.start, EXCLUDED.stop, False, True),
        (EXCLUDED.stop, 4 * MIB, True, False),
    ]


def test_a_dirty_bitmap_is_read_through_image_options(week):
    """qemu's own trick: the bitmap's dirty extents are those that look unallocated."""
    served, _ = week
    name = image_options(served, "tuesday", **{"x-dirty-bitmap": "qemu:dirty-bitmap:monday"})
    dirty = [extent[:2] for extent in qemu_map(name) if not extent[2]]
    spans = [CHANGED, EXCLUDED, ZEROED]  # monday left EXCLUDED out, tuesday selects it
    assert dirty == [(span.start, span.stop) for span in spans]


@pytest.mark.parametrize("export", [None, "monday", "tuesday"])
def test_convert_and_compare_agree_with_the_export(week, tmp_path, export):
    served, contents = week
    (tmp_path / "expected").write_bytes(contents[export or "web"])
    raw, qcow2 = str(tmp_path / "copy.raw"), str(tmp_path / "copy.qcow2")
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", served.uri(export), raw)
    run("qemu-img", "convert", "-m", "8", "-W", "-O", "qcow2", served.uri(export), qcow2)
    assert (tmp_path / "copy.raw").read_bytes() == contents[export or "web"]
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow2, str(tmp_path / "expected"))
    run("qemu-img", "compare", "-s", "-f", "raw", "-F", "raw", served.uri(export), raw)


def test_an_increment_by_the_dirty_bitmap_makes_the_old_copy_the_new_one(week, tmp_path):
    """What a backup client does: the blocks that are dirty, onto the last full copy."""
    served, contents = week
    copy = bytearray(contents["monday"])
    name = image_options(served, "tuesday", **{"x-dirty-bitmap": "qemu:dirty-bitmap:monday"})
    with served.client("tuesday") as client:
        for start, end, is_clean, _, _ in qemu_map(name):
            if not is_clean:
                copy[start:end] = client.pread(offset=start, length=end - start)
    # What monday left out and tuesday selects is in it whole, changed or not.
    assert copy == contents["tuesday"]


def test_converting_into_the_served_disk_is_seen_and_undone_by_a_restore(served, tmp_path):
    before = served.origin.read_bytes()
    served.snapshot("before")
    (tmp_path / "image").write_bytes(pattern(20, 4 * MIB))
    run(
        "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(tmp_path / "image"), served.uri()
    )  # fmt: skip
    assert served.read() == pattern(20, 4 * MIB)
    served.cli("restore", "run", "web@before", "--yes")
    assert served.read() == before
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", served.uri(), served.uri("before"))


def test_write_zero_discard_and_fua_do_what_they_say(served):
    before = bytearray(served.origin.read_bytes())
    served.snapshot("before")
    io(
        served.uri(),
        "write -P 0xaa 0 64k",
        "write -f -P 0xbb 100000 5000",
        "write -z 1M 128k",
        "write -z -u 2M 128k",
        "discard 3M 64k",
        "flush",
        "read -P 0xaa 0 64k",
        "read -P 0xbb 100000 5000",
        "read -P 0 1M 128k",
        "read -P 0 2M 128k",
    )
    live = bytearray(before)
    live[: 64 << 10] = b"\xaa" * (64 << 10)
    live[100000:105000] = b"\xbb" * 5000
    live[MIB : MIB + (128 << 10)] = bytes(128 << 10)
    live[2 * MIB : 2 * MIB + (128 << 10)] = bytes(128 << 10)
    # Discarded blocks that the snapshot still needs stay as they are: a discard costs no copy.
    assert served.read() == live
    assert served.read("before") == before


def test_discarding_what_no_snapshot_needs_gives_its_space_back(served):
    blocks = served.origin.stat().st_blocks
    io(served.uri(), "discard 0 4M", "flush")
    assert served.read() == bytes(4 * MIB)
    assert served.origin.stat().st_blocks < blocks // 8


def test_many_requests_at_once_land_where_they_should(served):
    served.snapshot("before")
    before = served.origin.read_bytes()
    commands = [f"aio_write -P {number % 251 + 1} {number * 6000} 6000" for number in range(600)]
    io(served.uri(), *commands, "aio_flush", "flush")
    expected = b"".join(bytes([number % 251 + 1]) * 6000 for number in range(600))
    assert served.read()[: len(expected)] == expected
    assert served.read("before") == before


def test_a_snapshot_takes_no_writes(served):
    served.snapshot("before")
    ran = try_run("qemu-io", "-f", "raw", "-c", "write 0 4k", served.uri("before"))
    assert ran.code != 0
    assert "Permission denied" in ran.err


@pytest.mark.parametrize("command", ["write 0 4k", "discard 0 64k"])
def test_the_origin_of_a_served_disk_is_locked_against_writers(served, command):
    before = served.origin.read_bytes()
    ran = try_run("qemu-io", "-f", "raw", "-c", command, str(served.origin))
    assert ran.code != 0
    assert "lock" in ran.err
    ran = try_run("qemu-img", "resize", "-f", "raw", str(served.origin), "+1M")
    assert ran.code != 0
    assert "lock" in ran.err
    assert served.origin.read_bytes() == before
    served.stop()
    io(str(served.origin), "write -P 0x11 0 4k")
    assert served.origin.read_bytes()[:BLOCK] == b"\x11" * BLOCK


def test_a_disk_that_qemu_has_open_is_not_served(served):
    served.stop()
    import subprocess

    holder = subprocess.Popen(
        ["qemu-io", "-f", "raw", str(served.origin)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write("read 0 512\n")
        holder.stdin.flush()
        while "512 bytes" not in holder.stdout.readline():
            assert holder.poll() is None
        ran = served.try_cli("serve", "web")
        assert ran.code == 11
        assert str(served.origin) in ran.err
        assert "in use by another process" in ran.err
    finally:
        holder.communicate("quit\n")
