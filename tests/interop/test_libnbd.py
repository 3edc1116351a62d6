"""libnbd, as nbdsh drives it: every request by itself, with its errors."""

from __future__ import annotations

import subprocess

import pytest

from serving import BLOCK, MIB, pattern

SYSTEM_PYTHON = "/usr/bin/python3"
HEAD = """
import errno, sys, nbd
def connect(uri, *contexts):
    handle = nbd.NBD()
    for context in contexts:
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    return handle
def failing(call):
    try:
        call()
    except nbd.Error as error:
        return error.errno
    return "no error"
"""


def has_libnbd() -> bool:
    try:
        ran = subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, check=False)
    except OSError:
        return False
    return ran.returncode == 0


pytestmark = [pytest.mark.needs("nbdsh"), pytest.mark.slow]


@pytest.fixture
def script(nbdsh):
    """`script(text, *arguments)`: lines printed; the text finds `connect`, `failing`, `uri`."""
    if not has_libnbd():
        pytest.fail("libnbd's Python module is missing: tools/bootstrap test must install it")
    return lambda text, *arguments: nbdsh(
        HEAD + "uri = sys.argv[1]\nmore = sys.argv[2:]\n" + text, *arguments
    )


def test_a_snapshot_refuses_every_kind_of_write_with_eperm(served, script):
    served.snapshot("s")
    lines = script(
        """
h = connect(uri)
h.set_strict_mode(0)
print(failing(lambda: h.pwrite(bytes(512), 0)))
print(failing(lambda: h.trim(4096, 0)))
print(failing(lambda: h.zero(4096, 0)))
print(len(h.pread(512, 0)))
""",
        served.uri("s"),
    )
    assert lines == ["EPERM", "EPERM", "EPERM", "512"]


def test_what_reaches_past_the_end_is_enospc_for_writes_and_einval_for_reads(served, script):
    lines = script(
        """
h = connect(uri)
h.set_strict_mode(0)
size = h.get_size()
print(failing(lambda: h.pwrite(bytes(1024), size - 512)))
print(failing(lambda: h.zero(4096, size - 512)))
print(failing(lambda: h.pwrite(bytes(512), 1 << 62)))
print(failing(lambda: h.pread(1024, size - 512)))
print(failing(lambda: h.trim(4096, size)))
h.pwrite(b"z" * 512, size - 512)
print(h.pread(512, size - 512) == b"z" * 512)
""",
        served.uri(),
    )
    assert lines == ["ENOSPC", "ENOSPC", "ENOSPC", "EINVAL", "EINVAL", "True"]


def test_a_write_on_one_connection_is_covered_by_a_flush_on_another(served, script):
    """What CAN_MULTI_CONN promises: seen by all at once, durable for all at once."""
    served.snapshot("s")
    before = served.origin.read_bytes()
    lines = script(
        """
handles = [connect(uri) for _ in range(4)]
print(all(h.can_multi_conn() for h in handles))
for round in range(50):
    data = bytes([round + 1]) * 5000
    handles[round % 4].pwrite(data, round * 5000)
    print(all(h.pread(5000, round * 5000) == data for h in handles))
handles[0].flush()
""",
        served.uri(),
    )
    assert set(lines) == {"True"}
    # A flush brings everything home: the origin itself shows what all four wrote.
    origin = served.origin.read_bytes()
    assert origin[:250_000] == b"".join(bytes([number + 1]) * 5000 for number in range(50))
    assert origin[250_000:] == before[250_000:]
    assert served.read("s") == before


def test_fua_brings_its_own_blocks_home(served, script):
    served.snapshot("s")
    script("h = connect(uri)\nh.pwrite(b'f' * 9000, 5000, nbd.CMD_FLAG_FUA)", served.uri())
    assert served.origin.read_bytes()[5000:14_000] == b"f" * 9000


def test_a_read_that_must_not_be_fragmented_comes_in_one_piece(served, script):
    lines = script(
        """
h = connect(uri)
h.zero(1 << 20, 1 << 20)
for flags in (0, nbd.CMD_FLAG_DF):
    chunks = []
    def chunk(data, offset, status, error):
        chunks.append((offset, len(data)))
    h.pread_structured(2 << 20, 1 << 19, chunk, flags)
    print(len(chunks), sum(length for _, length in chunks), min(offset for offset, _ in chunks))
""",
        served.uri(),
    )
    fragmented, whole = ([int(word) for word in line.split()] for line in lines)
    assert fragmented[1:] == whole[1:] == [2 * MIB, MIB // 2]
    assert whole[0] == 1


def test_block_status_follows_writes_that_are_still_in_the_buffer(served, script):
    """Cause: the origin was looked at before the buffer: what left it in between was a hole."""
    served.snapshot("s")
    lines = script(
        """
h = connect(uri, "base:allocation", "x-stillblock:changed:s", "qemu:dirty-bitmap:s")
h.zero(4 << 20, 0)
h.flush()
holes = 0
for block in range(0, 1024, 3):
    h.pwrite(b"d" * 4096, block * 4096)
    found = {}
    def extents(context, offset, entries, error):
        found[context] = entries
    for _ in range(3):
        h.block_status(4096, block * 4096, extents, nbd.CMD_FLAG_REQ_ONE)
        holes += found["base:allocation"][1] != 0
        holes += found["x-stillblock:changed:s"][1] != 1
        holes += found["qemu:dirty-bitmap:s"][1] != 1
print(holes)
""",
        served.uri(),
    )
    assert lines == ["0"]


def test_block_status_covers_the_whole_disk_in_order(served, script):
    served.snapshot("s", "--exclude", "1MiB-2MiB")
    lines = script(
        """
h = connect(uri, "base:allocation", "x-stillblock:selected")
at, found = 0, []
while at < h.get_size():
    step = {}
    def extents(context, offset, entries, error):
        assert offset == at
        step[context] = entries
    h.block_status(min(h.get_size() - at, 1234567), at, extents)
    entries = step["x-stillblock:selected"]
    for length, flags in zip(entries[::2], entries[1::2]):
        found.append((at, at + length, flags))
        at += length
print(found)
""",
        served.uri("s"),
    )
    selected = eval(lines[0])  # a list that our own script printed
    left_out = [extent for extent in selected if extent[2] == 0]
    assert (left_out[0][0], left_out[-1][1]) == (MIB, 2 * MIB)
    assert [a[1] for a in selected[:-1]] == [b[0] for b in selected[1:]]
    assert selected[-1][1] == 4 * MIB


def test_an_export_that_is_not_there_is_refused_and_the_next_one_served(served, script):
    lines = script(
        """
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
for name in ("nothing", "web@nothing", "x" * 4096):
    h.set_export_name(name)
    print(failing(lambda: h.opt_go()))
h.set_export_name("web")
h.opt_go()
print(len(h.pread(10, 0)))
""",
        served.uri(),
    )
    assert lines == ["ENOENT", "ENOENT", "ENOENT", "10"]


def test_odd_bytes_at_every_border_land_exactly(served, script):
    served.snapshot("s")
    before = bytearray(served.origin.read_bytes())
    script(
        """
h = connect(uri)
for number in range(1, 200):
    h.pwrite(bytes([number]) * (number * 37), number * 4096 - number * 11)
""",
        served.uri(),
    )
    live = bytearray(before)
    for number in range(1, 200):
        start = number * BLOCK - number * 11
        live[start : start + number * 37] = bytes([number]) * (number * 37)
    assert served.read() == live
    assert served.read("s") == before


def test_a_read_only_server_refuses_writes_to_the_live_disk(script):
    from serving import volume

    with volume(pattern(1, MIB)) as served:
        served.start("--read-only")
        lines = script(
            """
h = connect(uri)
h.set_strict_mode(0)
print(h.is_read_only(), failing(lambda: h.pwrite(bytes(512), 0)))
""",
            served.uri(),
        )
        assert lines == ["True EPERM"]


def test_excluded_reads_are_errors_where_that_was_asked_for(script):
    from serving import volume

    with volume(pattern(1, MIB)) as served:
        served.start("--excluded-reads", "error")
        served.snapshot("s", "--exclude", "512KiB-768KiB")
        lines = script(
            """
h = connect(uri)
print(len(h.pread(4096, 0)), len(h.pread(4096, 800 << 10)))
print(failing(lambda: h.pread(4096, 600 << 10)))
""",
            served.uri("s"),
        )
        assert lines == ["4096 4096", "EIO"]
