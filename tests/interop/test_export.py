"""Images that `export` writes, judged by QEMU and by the NBD export of the same instant."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import wait_gone
from serving import BLOCK, MIB, Served, pattern, run, volume
from stillblock.model import RuleTerm
from stillblock.operations.snapshots import SnapshotRequest

pytestmark = [pytest.mark.needs("qemu-img", "qemu-nbd"), pytest.mark.slow]

SIZE = 6 * MIB
ALL = (RuleTerm(include=True, text="all"),)
EXCLUDED = slice(MIB, 2 * MIB)


@pytest.fixture(scope="module")
def week() -> Iterator[tuple[Served, bytes]]:
    """A served disk with data, zeros and holes, changed since its snapshot, and what that holds."""
    content = bytearray(pattern(7, SIZE))
    content[3 * MIB : 4 * MIB] = bytes(MIB)
    with volume(bytes(content)) as made:
        made.start()
        made.snapshot("monday", "--exclude", "1MiB-2MiB")
        content[EXCLUDED] = bytes(MIB)
        with made.client() as client:
            client.pwrite(pattern(8, 64 * BLOCK), offset=5 * MIB)
            client.flush()
        made.cli("clone", "create", "web@monday+try")
        with made.client("monday+try") as client:
            client.pwrite(b"clone" * 1000, offset=MIB + 100)
            client.flush()
        yield made, bytes(content)


def test_a_qcow2_image_is_the_snapshot_and_is_sound(
    week: tuple[Served, bytes], tmp_path: Path
) -> None:
    served, content = week
    image = tmp_path / "out.qcow2"
    done = served.cli("export", "web@monday", str(image), "--json").json
    assert (done["format"], done["left_out_bytes"], done["lost_bytes"]) == ("qcow2", MIB, 0)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", served.uri("monday"), str(image))
    run("qemu-img", "check", str(image))
    assert image.stat().st_size < 5 * MIB, "neither zeros nor what is left out take room"
    run("qemu-img", "convert", "-O", "raw", str(image), str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out.qcow2"]


def test_raw_images_and_streams_are_the_snapshot_whether_it_is_served_or_not(
    week: tuple[Served, bytes], tmp_path: Path
) -> None:
    served, content = week
    served.cli("export", "web@monday", str(tmp_path / "a.img"))
    served.stop()
    try:
        served.cli("export", "web@monday", str(tmp_path / "b.raw"))
        with (tmp_path / "c").open("wb") as out:
            subprocess.run(
                [sys.executable, "-m", "stillblock", "export", "web@monday", "-"],
                env=served.environment,
                stdout=out,
                check=True,
            )
    finally:
        served.start()
    for name in ("a.img", "b.raw", "c"):
        assert (tmp_path / name).read_bytes() == content, name
    assert (tmp_path / "a.img").stat().st_blocks * 512 < 5 * MIB
    again = served.try_cli("export", "web@monday", str(tmp_path / "a.img"))
    assert again.code == 1
    assert "exists already; it is not overwritten" in again.err


def test_a_clone_is_exported_with_what_was_written_to_it(
    week: tuple[Served, bytes], tmp_path: Path
) -> None:
    served, content = week
    served.cli("export", "web@monday+try", str(tmp_path / "clone.qcow2"))
    run("qemu-img", "convert", "-O", "raw", str(tmp_path / "clone.qcow2"), str(tmp_path / "back"))
    expected = bytearray(content)
    expected[MIB + 100 : MIB + 5100] = b"clone" * 1000
    assert (tmp_path / "back").read_bytes() == expected


@pytest.mark.parametrize("form", ["vmdk", "vdi", "vhdx"])
def test_other_formats_of_qemu_hold_the_same(
    week: tuple[Served, bytes], tmp_path: Path, form: str
) -> None:
    served, _ = week
    image = tmp_path / "image"
    served.cli("export", "web@monday", str(image), "--format", form)
    run("qemu-img", "compare", "-f", "raw", "-F", form, served.uri("monday"), str(image))


def test_what_is_lost_is_no_image_but_if_asked_for(tmp_path: Path) -> None:
    with volume(pattern(9, 16 * MIB), "--store-limit", "6M") as served:
        served.start()
        before = served.origin.read_bytes()
        with served.session() as session, served.client() as client:
            session.create_snapshot(SnapshotRequest(name="monday", terms=ALL))
            client.pwrite(pattern(10, 12 * MIB), offset=0)
            client.flush()
            info = session.show_snapshot("monday")
        assert info.lost_bytes > 0
        refused = served.try_cli("export", "web@monday", str(tmp_path / "x.qcow2"))
        assert refused.code == 13
        assert "--allow-lost exports it with holes in their place" in refused.err
        assert list(tmp_path.iterdir()) == []
        image = tmp_path / "x.raw"
        partly = served.try_cli("export", "web@monday", str(image), "--allow-lost", "--json")
        assert partly.code == 3
        assert partly.json["lost_bytes"] == info.lost_bytes
        expected = bytearray(before)
        for start, end in info.lost:
            expected[start:end] = bytes(end - start)
        assert image.read_bytes() == expected


def test_an_export_that_is_killed_leaves_no_image_and_a_raw_one_goes_on(
    week: tuple[Served, bytes], tmp_path: Path
) -> None:
    served, content = week
    image = tmp_path / "big.raw"
    # The command stops itself where it would tell that it is half done.
    script = f"""
import os, signal
from stillblock.operations import exporting
exporting.STEP_BYTES = {MIB}
write = exporting.RawImage.write
def stopping(self, data, *, offset):
    if offset >= {4 * MIB}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, data, offset=offset)
exporting.RawImage.write = stopping
from stillblock.cli import main
main(["export", "web@monday", {str(image)!r}])
"""
    ended = subprocess.run([sys.executable, "-c", script], env=served.environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not image.exists()
    assert sorted(os.listdir(tmp_path)) == ["big.raw.partial", "big.raw.partial.steps"]
    refused = served.try_cli("export", "web@monday", str(image))
    assert refused.code == 1
    assert "--resume goes on with it" in refused.err
    # Its steps were of another length than this process makes them.
    served.cli("export", "web@monday", str(image), "--resume")
    assert image.read_bytes() == content
    assert os.listdir(tmp_path) == ["big.raw"]


def test_killed_qemu_images_leave_no_process_and_no_name(
    week: tuple[Served, bytes], tmp_path: Path
) -> None:
    served, _ = week
    image = tmp_path / "x.qcow2"
    script = f"""
import os, signal
from stillblock.service import qemu_images
def stopping(self, data, *, offset):
    print(self._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
qemu_images.QemuImage.write = stopping
from stillblock.cli import main
main(["export", "web@monday", {str(image)!r}])
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=served.environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert not image.exists()
    pid = int(ended.stdout)
    assert wait_gone([pid])
    again = served.try_cli("export", "web@monday", str(image))
    assert again.code == 1
    assert "x.qcow2.partial exists already; remove it" in again.err
