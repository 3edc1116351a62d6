"""fio, nbdfuse, nbd-client's line, and a client of before 2016."""

from __future__ import annotations

import json
import os
import shlex
import socket
import struct
import subprocess
import threading
from contextlib import ExitStack

import pytest

from mounted import as_file
from serving import BLOCK, MIB, Served, pattern, run, volume
from stillblock.demo.nbd_client import NbdError

pytestmark = pytest.mark.slow


@pytest.mark.needs("fio")
@pytest.mark.timeout(180)
def test_fio_verifies_what_it_wrote_under_snapshots(tmp_path):
    size = 32 * MIB
    with volume(pattern(30, size)) as served:
        before = served.origin.read_bytes()
        served.start()
        served.snapshot("before", "--include", "0-16MiB")
        job = [
            "fio", "--name=verify", "--ioengine=nbd", f"--uri={served.uri()}", f"--size={size}",
            "--rw=randwrite", "--bsrange=512-96k", "--bs_unaligned=0", "--iodepth=16",
            "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_backlog=256",
            "--fsync=64", "--randseed=7", "--output-format=json",
        ]  # fmt: skip
        taken = threading.Thread(target=lambda: served.snapshot("midway"))
        taken.start()
        ran = subprocess.run(
            job, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False
        )
        taken.join()
        assert ran.returncode == 0, ran.stdout + ran.stderr
        (result,) = json.loads(ran.stdout[ran.stdout.index("{") :])["jobs"]
        assert result["error"] == 0
        assert result["write"]["io_bytes"] >= size
        assert served.read("before") == before[: 16 * MIB] + bytes(16 * MIB)


@pytest.fixture
def mounted(served):
    """`mounted(snapshot)`: the export as a file; nbdfuse mounts the directory it is in."""
    with ExitStack() as stack:
        yield lambda snapshot=None: stack.enter_context(as_file(served, snapshot))[0]


@pytest.mark.needs("nbdfuse", "fusermount3")
def test_nbdfuse_shows_a_snapshot_as_a_file_and_writes_the_live_disk(served, mounted):
    before = served.origin.read_bytes()
    served.snapshot("s")
    live, still = mounted(), mounted("s")
    with live.open("r+b") as disk:
        disk.seek(MIB)
        disk.write(pattern(31, 10_000))
        disk.flush()
        os.fsync(disk.fileno())
    assert still.read_bytes() == before
    assert served.read()[MIB : MIB + 10_000] == pattern(31, 10_000)
    with pytest.raises(OSError, match=r"ead-only|ermi"):
        still.open("r+b").write(b"x")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nbd-client", ["nbd-client", "-unix"]),
        ("nbdfuse", ["nbdfuse", "mnt/web.img"]),
        ("qemu", ["-blockdev", "-device"]),
    ],
)
def test_what_serve_prints_can_be_pasted(kind, words):
    with volume(pattern(1, MIB)) as served:
        served.start("--print", kind)
        line = served.ready["attachments"]["web"]
        parsed = shlex.split(line)
        assert served.socket in line
        for word in words:
            assert word in parsed


@pytest.mark.needs("nbdinfo")
def test_the_uri_that_serve_prints_is_the_one_that_works(served):
    (export,) = served.ready["serve"]["exports"]
    assert run("nbdinfo", "--size", export["uri"]).out.strip() == str(4 * MIB)


def old_handshake(served: Served, name: bytes, client_flags: int) -> tuple[socket.socket, bytes]:
    """Negotiate as clients did before NBD_OPT_GO; return the socket and what it answered."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(served.socket)
    greeting = connection.recv(18, socket.MSG_WAITALL)
    assert greeting[:16] == b"NBDMAGICIHAVEOPT"
    connection.sendall(struct.pack(">I", client_flags))
    connection.sendall(b"IHAVEOPT" + struct.pack(">II", 1, len(name)) + name)
    return connection, connection.recv(10, socket.MSG_WAITALL)


@pytest.mark.parametrize(("client_flags", "padding"), [(1, 124), (3, 0)])
def test_an_old_client_names_its_export_and_gets_it(served, client_flags, padding):
    before = served.origin.read_bytes()
    served.snapshot("s")
    for name in (b"web", b"web@s", b""):
        connection, answer = old_handshake(served, name, client_flags)
        with connection:
            size, flags = struct.unpack(">QH", answer)
            assert size == 4 * MIB
            assert bool(flags & 2) == (name == b"web@s")
            assert connection.recv(padding, socket.MSG_WAITALL) == bytes(padding)
            request = struct.pack(">IHHQQI", 0x25609513, 0, 0, 77, 5000, BLOCK)
            connection.sendall(request)
            magic, error, cookie = struct.unpack(">IIQ", connection.recv(16, socket.MSG_WAITALL))
            assert (magic, error, cookie) == (0x67446698, 0, 77)
            assert connection.recv(BLOCK, socket.MSG_WAITALL) == before[5000 : 5000 + BLOCK]


def test_an_old_client_that_names_no_export_of_ours_is_hung_up_on(served):
    connection, answer = old_handshake(served, b"nothing", 3)
    with connection:
        assert answer == b""
    assert len(served.read()) == 4 * MIB


def test_deleting_a_snapshot_in_use_is_refused_and_forced_cuts_its_readers_only(served):
    before = served.origin.read_bytes()
    served.snapshot("a")
    served.snapshot("b")
    with served.client() as writer, served.client("a") as reader, served.client("b") as other:
        writer.pwrite(pattern(32, MIB), offset=0)
        refused = served.try_cli("snapshot", "delete", "web@a", "--yes")
        assert refused.code == 1
        assert "web@a" in refused.err
        assert "in use" in refused.err
        assert reader.pread(offset=0, length=4 * MIB) == before

        served.cli("snapshot", "delete", "web@a", "--yes", "--force")
        with pytest.raises((NbdError, OSError)):
            reader.pread(offset=0, length=BLOCK)
        assert other.pread(offset=0, length=4 * MIB) == before
        writer.pwrite(pattern(33, MIB), offset=MIB)
        assert writer.pread(offset=MIB, length=MIB) == pattern(33, MIB)
        with pytest.raises(NbdError, match="refused"):
            served.client("a")
    assert served.cli("snapshot", "delete", "web@b", "--yes").code == 0
    assert served.cli("volume", "show", "web", "--json").json["volume"]["store_bytes"] == 0


def test_renaming_a_snapshot_moves_its_export_and_cuts_nobody_else(served):
    before = served.origin.read_bytes()
    served.snapshot("a")
    with served.client() as writer:
        served.cli("snapshot", "rename", "web@a", "first")
        writer.pwrite(b"w" * BLOCK, offset=0)
        assert served.read("first") == before
        with pytest.raises(NbdError, match="refused"):
            served.client("a")
