"""Every example runs, and does what its first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stillblock
from compat.layout import ROOT

EXAMPLES = ROOT / "examples"
MIB = 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    origin = tmp_path / "disk.img"
    origin.write_bytes(b"monday!!" * (MIB // 16))
    os.truncate(origin, MIB)  # the other half is a hole
    stillblock.create("web", origin=origin, store=tmp_path / "store", exclude=["0-64K"])
    return origin


def run(name: str, *words: object) -> str:
    command = [sys.executable, EXAMPLES / name, *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_no_example_is_without_a_test():
    text = Path(__file__).read_text(encoding="utf-8")
    assert [p.name for p in sorted(EXAMPLES.glob("*.py")) if f'"{p.name}"' not in text] == []


def test_a_snapshot_is_copied_out(disk, tmp_path):
    image = tmp_path / "copy.img"
    assert run("copy_out.py", "web", image) == (
        f"{MIB // 2 - 65536} bytes of web copied to {image}\n"
    )
    assert image.read_bytes() == bytes(65536) + disk.read_bytes()[65536:]
    with stillblock.open("web") as volume:
        assert volume.snapshots() == ()


def test_what_changed_is_listed(disk):
    with stillblock.open("web") as volume:
        volume.snapshot("a")
        volume.pwrite(b"x" * 4096, offset=128 * 1024)
        volume.write_zeroes(offset=256 * 1024, length=8192)
        volume.snapshot("b")
        volume.pwrite(b"y", offset=512 * 1024)
    assert run("what_changed.py", "web", "a", "b").splitlines() == [
        "        131072       4096",
        "        262144       8192 zeros",
        "12288 bytes in 2 extents",
    ]
    assert run("what_changed.py", "web", "b").splitlines() == [
        "        524288       4096",
        "4096 bytes in 1 extents",
    ]


@pytest.mark.needs("nbdcopy", "qemu-io")
def test_a_disk_and_its_snapshot_are_served_from_python(disk, tmp_path):
    before = disk.read_bytes()
    socket = tmp_path / "s"
    command = [sys.executable, EXAMPLES / "serve.py", tmp_path / "store", socket]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        live, still = (process.stdout.readline().strip() for _ in range(2))
        write = ["qemu-io", "-f", "raw", "-c", "write -P 0xee 64k 4k", live]
        subprocess.run(write, check=True, capture_output=True)
        subprocess.run(["nbdcopy", still, tmp_path / "still.img"], check=True)
        process.communicate("\n", timeout=20)
    assert process.returncode == 0
    assert (tmp_path / "still.img").read_bytes() == before
    assert disk.read_bytes() == before[:65536] + b"\xee" * 4096 + before[69632:]
    assert not socket.exists()


def test_the_ten_lines_of_the_readme_run(disk, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    # A disk of 1 MiB without partitions: the offsets and the term of the README's tour do not fit.
    code = code.replace("8 << 20", "1 << 17").replace("part:type=swap", "64K-128K")
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["((131072, 135168),)", "b'monday'"]
