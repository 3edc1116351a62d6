"""nbdcopy: whole disks, both ways, while the disk is written."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest

from serving import BLOCK, MIB, pattern, run, volume

pytestmark = [pytest.mark.needs("nbdcopy"), pytest.mark.slow]


@pytest.mark.parametrize("options", [(), ("--synchronous",), ("--connections=4",)])
@pytest.mark.parametrize("export", ["web", "monday", "tuesday"])
def test_a_copy_is_the_export_byte_for_byte(week, tmp_path, export, options):
    served, contents = week
    uri = served.uri(None if export == "web" else export)
    run("nbdcopy", *options, uri, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == contents[export]


def test_a_disk_copied_in_is_there_and_the_snapshot_before_it_too(served, tmp_path):
    before = served.origin.read_bytes()
    served.snapshot("before")
    image = bytearray(pattern(7, 4 * MIB))
    image[MIB : 2 * MIB] = bytes(MIB)
    (tmp_path / "image").write_bytes(image)
    run("nbdcopy", "--flush", "--connections=4", str(tmp_path / "image"), served.uri())
    assert served.read() == image
    assert served.read("before") == before
    assert served.stop().code == 0
    assert served.origin.read_bytes() == image


def test_a_sparse_disk_copied_in_leaves_holes_and_the_snapshot_before_it(served, tmp_path):
    before = served.origin.read_bytes()
    served.snapshot("before")
    with (tmp_path / "image").open("wb") as image:
        image.truncate(4 * MIB)
        image.seek(MIB)
        image.write(pattern(8, BLOCK))
    run("nbdcopy", "--flush", str(tmp_path / "image"), served.uri())
    assert served.read() == (tmp_path / "image").read_bytes()
    assert served.read("before") == before
    served.stop()
    assert served.origin.stat().st_blocks * 512 < MIB


def test_a_snapshot_copied_onto_the_disk_itself_takes_it_back(served):
    before = served.origin.read_bytes()
    served.snapshot("before")
    with served.client() as client:
        client.pwrite(pattern(9, MIB), offset=MIB // 2)
    run("nbdcopy", "--flush", served.uri("before"), served.uri())
    assert served.read() == before
    assert served.read("before") == before


def stamp(served, stop, errors, *, first, last, seed):
    """Write stamped blocks from one end to the other, until told to stop, verifying each."""
    try:
        with served.client() as client:
            count = 0
            while not stop.is_set():
                offset = first + (count * 7919 * BLOCK) % (last - first)
                data = (seed + count).to_bytes(8, "little") * (BLOCK // 8)
                client.pwrite(data, offset=offset)
                if count % 16 == 0:
                    assert client.pread(offset=offset, length=BLOCK) == data
                    client.flush()
                count += 1
            assert count > 50
    except BaseException as error:  # noqa: BLE001 - handed to the test's thread
        errors.append(error)


@pytest.mark.timeout(180)
def test_a_snapshot_is_copied_exactly_while_selected_and_unselected_blocks_are_written(tmp_path):
    size, border = 64 * MIB, 32 * MIB
    with volume(pattern(10, size)) as served:
        before = served.origin.read_bytes()
        served.start()
        served.snapshot("still", "--include", "0-32MiB")
        stop, errors = threading.Event(), []
        writers = [
            threading.Thread(
                target=stamp,
                args=(served, stop, errors),
                kwargs={"first": first, "last": last, "seed": first},
            )
            for first, last in (
                (0, border // 2),
                (border // 2, border),
                (border, size - 16 * MIB),
                (size - 16 * MIB, size),
            )
        ]
        for writer in writers:
            writer.start()
        try:
            copies = [tmp_path / f"copy{number}" for number in range(3)]
            for copy in copies:
                run("nbdcopy", "--connections=4", served.uri("still"), str(copy))
        finally:
            stop.set()
            for writer in writers:
                writer.join()
        assert errors == []
        for copy in copies:
            assert copy.read_bytes() == before[:border] + bytes(size - border)
        live = served.read()
        assert served.stop().code == 0
        assert served.origin.read_bytes() == live


def test_killing_all_clients_of_one_export_leaves_the_others_untouched(served):
    before = served.origin.read_bytes()
    served.snapshot("a")
    served.snapshot("b")
    with served.client() as writer, served.client("b") as other:
        readers = [
            subprocess.Popen(
                ["nbdcopy", "--requests=1", "--request-size=4096", served.uri("a"), "-"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for _ in range(4)
        ]
        for reader in readers:
            assert reader.stdout is not None
            os.read(reader.stdout.fileno(), 1)  # it is in the midst of it
            reader.kill()
            reader.communicate()
        writer.pwrite(pattern(11, MIB), offset=0)
        writer.flush()
        assert writer.pread(offset=0, length=MIB) == pattern(11, MIB)
        assert other.pread(offset=0, length=4 * MIB) == before
    assert served.read("a") == before
    status = served.cli("status", "--json").json["volumes"][0]
    assert {export["name"] for export in status["exports"]} == {"web", "web@a", "web@b"}
    assert served.process is not None
    assert served.process.poll() is None
