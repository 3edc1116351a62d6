"""Exporting to images: what is copied, and what is kept of a raw one that was broken off."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from stillblock import native
from stillblock.errors import InUseError, OriginIOError, RefusedError, SnapshotLostError
from stillblock.extents import subtract
from stillblock.model import Extents
from stillblock.operations import exporting
from stillblock.operations.exporting import (
    ExportError,
    ExportPlan,
    RawImage,
    copy_data,
    plan_export,
    stream,
)
from stillblock.operations.held import Held
from unit.test_held import RECEIPT

K = 1024
SIZE = 1 << 20
STEP = 128 * K
HOLES: Extents = ((0, 8 * K), (300 * K, 520 * K))
EXCLUDED: Extents = ((600 * K, 640 * K),)
LOST: Extents = ((660 * K, 664 * K),)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "STEP_BYTES", STEP)
    monkeypatch.setattr(exporting, "CHUNK_BYTES", 48 * K)


@dataclass
class FakeDisk:
    content: bytes
    lost: Extents = ()
    size_bytes: int = SIZE
    reads: list[tuple[int, int]] = field(default_factory=list)

    def pread(self, *, offset: int, length: int) -> bytes:
        self.reads.append((offset, offset + length))
        if subtract(((offset, offset + length),), self.lost) != ((offset, offset + length),):
            raise OriginIOError("lost")
        return self.content[offset : offset + length]

    def extents(self, *, offset: int, length: int) -> list[tuple[int, int, int]]:
        asked = ((offset, offset + length),)
        gone = native.HOLE | native.ZERO
        told = [(s, e, gone) for s, e in HOLES] + [
            (s, e, gone | native.NOT_SELECTED) for s, e in EXCLUDED
        ]
        rest = subtract(asked, tuple(sorted((*HOLES, *EXCLUDED))))
        return sorted(told + [(s, e, 0) for s, e in rest])

    def close(self) -> None:
        """Nothing is open."""


def content(seed: int = 1) -> bytes:
    data = bytearray(random.Random(seed).randbytes(SIZE))
    for start, end in (*HOLES, *EXCLUDED, (800 * K, 1000 * K)):
        data[start:end] = bytes(end - start)
    return bytes(data)


def held_of(disk: FakeDisk, *, lost: Extents = (), name: str = "monday") -> Held:
    info = replace(RECEIPT.snapshot, name=name)
    selected = subtract(((0, SIZE),), EXCLUDED)
    return Held(disk, replace(RECEIPT, snapshot=info, extents=selected, left_out=(), lost=lost))


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk(content())


def exported(held: Held, to: Path, *, resume: bool = False, stop_after: int | None = None) -> int:
    """Export; break off after so many bytes if told so. Return where it began."""
    plan = plan_export(held)

    def told(done: int, _: int) -> None:
        if stop_after is not None and done >= stop_after:
            raise KeyboardInterrupt

    image = RawImage(to, plan, instant=held.reference)
    try:
        start = image.open(resume=resume)
        copy_data(held, plan, image, start=start, told=told)
        image.finish()
    finally:
        image.close()
    return start


def broken_off(held: Held, to: Path, *, after: int = 400 * K) -> Path:
    with pytest.raises(KeyboardInterrupt):
        exported(held, to, stop_after=after)
    return to.with_name(to.name + ".partial")


def test_data_is_copied_and_holes_are_holes(disk: FakeDisk, tmp_path: Path) -> None:
    to = tmp_path / "disk.raw"
    exported(held_of(disk), to)
    assert to.read_bytes() == disk.content
    assert to.stat().st_blocks * 512 < SIZE * 3 // 4
    assert list(tmp_path.iterdir()) == [to]
    read = [
        extent for extent in disk.reads if subtract((extent,), (*HOLES, *EXCLUDED)) != (extent,)
    ]
    assert read == [], "neither holes nor what is left out is read"


def test_standard_output_gets_all_of_it_in_order(disk: FakeDisk) -> None:
    out: list[bytes] = []
    held = held_of(disk)
    stream(held, plan_export(held), lambda data: out.append(bytes(data)))
    assert b"".join(out) == disk.content


def test_what_is_lost_is_an_error_and_a_hole_only_if_asked_for(tmp_path: Path) -> None:
    disk = FakeDisk(content(), lost=LOST)
    held = held_of(disk, lost=LOST)
    with pytest.raises(SnapshotLostError, match=r"lost 4 KiB in 1 extents.*--allow-lost"):
        plan_export(held)
    plan = plan_export(held, allow_lost=True)
    assert plan.lost == LOST
    out: list[bytes] = []
    stream(held, plan, lambda data: out.append(bytes(data)))
    expected = bytearray(disk.content)
    expected[LOST[0][0] : LOST[0][1]] = bytes(4 * K)
    assert b"".join(out) == expected


def test_damage_counts_as_lost(disk: FakeDisk) -> None:
    held = held_of(disk)
    damaged = Held(disk, replace(held.receipt, damaged=((700 * K, 704 * K),)))
    with pytest.raises(SnapshotLostError):
        plan_export(damaged)


# Broken off ---------------------------------------------------------------------------------------


def test_an_export_that_was_broken_off_goes_on_where_it_was_durable(
    disk: FakeDisk, tmp_path: Path
) -> None:
    to = tmp_path / "disk.raw"
    partial = broken_off(held_of(disk), to)
    assert not to.exists()
    assert partial.exists()
    disk.reads.clear()
    start = exported(held_of(disk), to, resume=True)
    assert start >= 300 * K
    assert start % STEP == 0
    assert min(begin for begin, _ in disk.reads) >= start
    assert to.read_bytes() == disk.content
    assert list(tmp_path.iterdir()) == [to]


def test_what_was_put_behind_the_last_durable_step_is_put_again(
    disk: FakeDisk, tmp_path: Path
) -> None:
    """A power cut leaves anything there."""
    to = tmp_path / "disk.raw"
    partial = broken_off(held_of(disk), to)
    with partial.open("r+b") as file:
        file.seek(700 * K)
        file.write(b"garbage" * 30_000)
    exported(held_of(disk), to, resume=True)
    assert to.read_bytes() == disk.content


@pytest.mark.parametrize("at", [10 * K, 200 * K])
def test_a_step_that_is_not_what_was_written_is_written_again(
    disk: FakeDisk, tmp_path: Path, at: int
) -> None:
    to = tmp_path / "disk.raw"
    partial = broken_off(held_of(disk), to)
    with partial.open("r+b") as file:
        file.seek(at)
        file.write(b"x")
    assert exported(held_of(disk), to, resume=True) == at - at % STEP
    assert to.read_bytes() == disk.content


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [*lines[:-1], lines[-1][: len(lines[-1]) // 2]],
        lambda lines: [*lines[:-1], lines[-1][:-1]],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0], b'{"extents": "x", "digest": ""}\n', *lines[1:]],
        lambda lines: [lines[0], b'{"end": 99, "extents": [[0, 99999999999]], "digest": ""}\n'],
        lambda lines: [lines[0], lines[1].replace(b'"end":131072', b'"end":999999999')],
        lambda lines: [lines[0], b"[]\n"],
        lambda lines: [lines[0]],
    ],
)
def test_a_list_of_steps_that_was_torn_or_spoiled_costs_time_only(
    disk: FakeDisk, tmp_path: Path, spoil
) -> None:
    to = tmp_path / "disk.raw"
    steps = Path(f"{broken_off(held_of(disk), to)}.steps")
    steps.write_bytes(b"".join(spoil(steps.read_bytes().splitlines(keepends=True))))
    exported(held_of(disk), to, resume=True)
    assert to.read_bytes() == disk.content


def test_it_can_be_broken_off_and_resumed_many_times(disk: FakeDisk, tmp_path: Path) -> None:
    to = tmp_path / "disk.raw"
    broken_off(held_of(disk), to, after=100 * K)
    for after in range(100 * K, 700 * K, 60 * K):
        with pytest.raises(KeyboardInterrupt):
            exported(held_of(disk), to, resume=to.with_name("disk.raw.partial").exists(),
                     stop_after=after)  # fmt: skip
    exported(held_of(disk), to, resume=True)
    assert to.read_bytes() == disk.content


def test_another_instant_is_not_mixed_in(disk: FakeDisk, tmp_path: Path) -> None:
    to = tmp_path / "disk.raw"
    partial = broken_off(held_of(disk), to)
    before = partial.read_bytes()
    with pytest.raises(RefusedError, match=r"not of web@tuesday at this instant, but of web@mon"):
        exported(held_of(FakeDisk(content(2)), name="tuesday"), to, resume=True)
    assert partial.read_bytes() == before


def test_nothing_is_overwritten_or_resumed_that_was_not_asked_for(
    disk: FakeDisk, tmp_path: Path
) -> None:
    to = tmp_path / "disk.raw"
    with pytest.raises(RefusedError, match="nothing can be resumed"):
        exported(held_of(disk), to, resume=True)
    broken_off(held_of(disk), to)
    with pytest.raises(RefusedError, match="left of an export that was broken off"):
        exported(held_of(disk), to)
    to.write_bytes(b"somebody's")
    for resume in (False, True):
        with pytest.raises(RefusedError, match="exists already"):
            exported(held_of(disk), to, resume=resume)
    assert to.read_bytes() == b"somebody's"


def test_a_name_that_was_taken_meanwhile_stays_whose_it_is(disk: FakeDisk, tmp_path: Path) -> None:
    to = tmp_path / "disk.raw"
    held = held_of(disk)
    plan = plan_export(held)
    image = RawImage(to, plan, instant="x")
    image.open()
    copy_data(held, plan, image)
    to.write_bytes(b"somebody's")
    with pytest.raises(ExportError, match="File exists"):
        image.finish()
    image.close()
    assert to.read_bytes() == b"somebody's"


def test_two_exports_do_not_write_one_image(disk: FakeDisk, tmp_path: Path) -> None:
    to = tmp_path / "disk.raw"
    held = held_of(disk)
    plan = plan_export(held)
    first = RawImage(to, plan, instant=held.reference)
    first.open()
    with pytest.raises(InUseError):
        exported(held, to, resume=True)
    copy_data(held, plan, first)
    first.finish()
    first.close()
    assert to.read_bytes() == disk.content


def test_a_clone_is_not_resumed_and_nothing_of_it_stays(disk: FakeDisk, tmp_path: Path) -> None:
    held = held_of(disk)
    plan = plan_export(held)
    image = RawImage(tmp_path / "disk.raw", plan, instant=None)
    image.open()
    image.write(memoryview(b"x" * 100), offset=0)
    image.write(memoryview(b"x" * 100), offset=STEP)
    assert not image.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RefusedError, match="may have changed"):
        image.open(resume=True)


def test_a_disk_that_fails_leaves_what_can_be_resumed_once_it_works(tmp_path: Path) -> None:
    disk = FakeDisk(content(), lost=LOST)
    to = tmp_path / "disk.raw"
    with pytest.raises(OriginIOError):
        exported(held_of(disk), to)
    assert not to.exists()
    disk.lost = ()
    assert exported(held_of(disk), to, resume=True) >= 300 * K
    assert to.read_bytes() == disk.content


def test_a_plan_tells_what_there_is_to_copy(disk: FakeDisk) -> None:
    plan = plan_export(held_of(disk))
    assert isinstance(plan, ExportPlan)
    assert plan.data_bytes == SIZE - (8 + 220 + 40) * K
    assert plan.left_out_bytes == 40 * K
    assert os.fspath(plan.reference) == "web@monday"
