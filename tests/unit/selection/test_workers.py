"""Workers: real processes, with readers that crash, hang, eat memory, break out, and lie."""

import os
import struct
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest

from processes import wait_gone
from stillblock.codec import CodecError
from stillblock.errors import ClosedError, ExcludedError, OriginIOError
from stillblock.model import Extents
from stillblock.selection import Rules, resolve, resolve_frozen
from stillblock.selection.confinement import Limits, can_filter_calls
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems import Content, UnresolvedError
from stillblock.selection.filesystems.opening import READERS
from stillblock.selection.lvm_text import LvmTextError, parse_lvm_text
from stillblock.selection.survey import SurveyRequest, SurveyTerm, TermKind
from stillblock.selection.wire import (
    FRAME_BYTES_MAX,
    HEADER,
    Kind,
    WireError,
    pack_document,
    receive,
    unpack_document,
)
from stillblock.selection.workers import Worker, WorkerReaders, _section, _survey
from unit.selection.fake_filesystems import FakeFilesystem, partitioned, swap_head
from unit.selection.lvm_images import group_text, physical_volume, segment, volume
from unit.selection.partition_images import MIB, BytesDisk, FailingDisk, blank
from unit.selection.worker_readers import STEPS, counting

REQUEST = SurveyRequest(
    place_name="disk",
    terms=(SurveyTerm(kind=TermKind.PATH, glob="/a"), SurveyTerm(kind=TermKind.FREE)),
)


def nested(depth: int) -> dict[str, object]:
    return {"a": nested(depth - 1)} if depth else {}


def worker_of(reader: str, disk: Disk | None = None, limits: Limits | None = None) -> Worker:
    return Worker(
        disk or blank(MIB), reader=f"unit.selection.worker_readers:open_{reader}", limits=limits
    )


def failure_of(reader: str, limits: Limits | None = None) -> str:
    with worker_of(reader, limits=limits) as worker, pytest.raises(UnresolvedError) as caught:
        worker.survey(REQUEST)
    assert worker.is_ended
    return caught.value.message


def label_of(reader: str, disk: Disk | None = None) -> str:
    with worker_of(reader, disk) as worker:
        return worker.identify().label


def test_a_worker_answers_over_the_bytes_that_its_parent_gives_it() -> None:
    disk = blank(MIB)
    disk.content[:8] = bytes(range(8))
    with worker_of("good", disk) as worker:
        identity = worker.identify()
        found = worker.survey(REQUEST)
    assert (identity.label, identity.size) == ("0001020304050607", MIB)
    assert found.identity == identity
    assert [(group.terms, group.extents) for group in found.groups] == [((0,), ((4096, 8192),))]
    assert found.free == ((16384, 32768),)
    assert found.tallies[0].file_count == 1
    assert found.caveats == ("a \\x1b[2J caveat",)


# What readers do -------------------------------------------------------------------------------


def test_a_reader_that_does_not_understand_says_why_and_no_terminal_is_harmed() -> None:
    assert failure_of("refusing") == "the log is\\x1b[2J dirty"


def test_a_defect_in_a_reader_is_a_reason() -> None:
    assert failure_of("defective") == ("its reader failed with IndexError: list index out of range")


def test_a_crash_is_a_reason() -> None:
    assert failure_of("crashing") == "its reader broke off: it was ended by SIGSEGV"


def test_an_end_without_an_answer_is_a_reason() -> None:
    assert failure_of("exiting") == "its reader broke off: it ended with code 3"


def test_a_reader_that_hangs_is_killed() -> None:
    assert failure_of("hanging", Limits(wall_s=1.0)) == "its reader did not end within 1 s"


def test_a_reader_that_computes_without_an_end_is_killed_though_nobody_watches() -> None:
    assert failure_of("hanging", Limits(cpu_s=1)) == (
        "its reader broke off: it used more than 1 s of processor time"
    )


def test_readers_that_hang_on_every_partition_have_one_time_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(READERS, Content.EXT, "unit.selection.worker_readers:open_hanging")
    disk, _ = partitioned(FakeFilesystem(), FakeFilesystem(), FakeFilesystem())
    rules = Rules.parse([("exclude", "path:/**"), ("exclude", "free")])
    begun = time.monotonic()
    pending = resolve(rules, disk, block_size=4096).pending
    assert pending is not None
    found = resolve_frozen(pending, disk, readers=WorkerReaders(total_s=1.0))
    assert time.monotonic() - begun < 60

    assert found.extents == ((0, disk.size),), "all is kept"
    over = "the 1 s for all readers together were over"
    assert [(unresolved.place, unresolved.reason) for unresolved in found.unresolved] == [
        ("part:1", "its reader did not end within 1 s"),
        ("part:2", over),
        ("part:3", over),
    ]


def test_what_could_not_be_asked_for_its_label_in_time_may_have_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(READERS, Content.EXT, "unit.selection.worker_readers:open_hanging")
    disk, _ = partitioned(FakeFilesystem(), FakeFilesystem())

    def extents(action: str) -> Extents:
        rules = Rules.parse([(action, "fs:data")])
        readers = WorkerReaders(total_s=1.0)
        return resolve(rules, disk, block_size=4096, readers=readers).extents

    assert extents("include") == ((MIB, 3 * MIB),)
    assert extents("exclude") == ((0, disk.size),)


@pytest.mark.parametrize("reader", ["greedy", "greedy_step_by_step"])
def test_a_reader_that_eats_memory_fails_alone(reader: str) -> None:
    assert failure_of(reader, Limits(memory_bytes=256 * MIB)) == (
        "reading it needs more memory than 256 MiB"
    )


def test_a_reader_can_open_start_send_and_change_nothing() -> None:
    assert label_of("breaking_out") == ""


def test_a_worker_filters_its_system_calls_where_we_say_that_it_can() -> None:
    with worker_of("good") as worker:
        worker.identify()
        process = worker._process
        assert process is not None
        status = Path(f"/proc/{process.pid}/status").read_text()
    modes = dict(line.split(":\t") for line in status.splitlines())
    assert (modes["Seccomp"] == "2") == can_filter_calls()
    assert modes["NoNewPrivs"] == "1"


def test_a_reader_cannot_even_ask_for_its_limits() -> None:
    assert label_of("bounded") == "cannot ask True"


def test_reads_end_at_the_end_of_the_disk() -> None:
    assert label_of("reading_past_the_end") == "4 0"


def failing_at_the_start(error: Exception) -> FailingDisk:
    return FailingDisk(BytesDisk(bytearray(b"good" * 4096)), (0, 4096), error)


@pytest.mark.parametrize("error", [OriginIOError("bad sector"), ExcludedError("bad sector")])
def test_a_failed_read_reaches_the_reader_and_costs_only_itself(error: Exception) -> None:
    disk = failing_at_the_start(error)
    assert label_of("reading_badly", disk) == "bad sector, good"


def test_reads_of_every_size_bring_what_is_there_and_fail_only_where_they_must() -> None:
    size = 2 * MIB + 1000
    bad = 1_500_000 // 512 * 512
    disk = FailingDisk(BytesDisk(bytearray(counting(size))), (bad, bad + 512))
    failing = sorted(
        (offset, step)
        for step in STEPS
        for offset in range(0, size, step)
        if offset < bad + 512 and offset + step > bad
    )
    assert label_of("reading_in_steps", disk) == f"0 {failing}"


def test_a_volume_that_is_closed_meanwhile_ends_the_request() -> None:
    disk = failing_at_the_start(ClosedError("the volume was closed"))
    with worker_of("reading_badly", disk) as worker, pytest.raises(ClosedError):
        worker.identify()
    assert worker.is_ended


@pytest.mark.parametrize("reader", ["lying", "oversized"])
def test_an_answer_outside_the_filesystem_is_refused(reader: str) -> None:
    assert "malformed answer" in failure_of(reader)


def test_an_unknown_reader_is_a_reason() -> None:
    assert failure_of("nothing_of_this_name").startswith("its reader broke off")


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """Killed, a parent cannot clean up; its worker, busy with something else, must not stay."""
    program = (
        "import sys\n"
        "from stillblock.selection.workers import Worker\n"
        "from unit.selection.partition_images import blank\n"
        "worker = Worker(blank(4096), reader='unit.selection.worker_readers:open_hanging')\n"
        "worker.__enter__()\n"
        "print(worker._process.pid, flush=True)\n"
        "worker.identify()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    assert wait_gone([pid], 30), f"worker {pid} outlived its parent"


# The text of volume groups ----------------------------------------------------------------------


def test_the_text_of_a_volume_group_is_read_by_a_worker() -> None:
    odd = 'a { b = "x\udcffy \\" z" c = [ 1, "2", -3 ] d { e = 4.50 } } # end'
    for text in (group_text(volume("root", segment(0, 4, "pv0", 2))), odd):
        assert WorkerReaders().parse_lvm(text) == parse_lvm_text(text)


def test_a_text_that_is_none_of_a_volume_group_says_why() -> None:
    with pytest.raises(LvmTextError) as expected:
        parse_lvm_text("vg0 { id = }")
    with pytest.raises(LvmTextError) as caught:
        WorkerReaders().parse_lvm("vg0 { id = }")
    assert caught.value.message == expected.value.message


def test_a_volume_group_that_is_not_read_in_time_is_kept_whole() -> None:
    disk = BytesDisk(physical_volume(group_text(volume("swap", segment(0, 4, "pv0", 2)))))
    start = MIB + 2 * 64 * 1024
    disk.content[start : start + 4096] = swap_head()
    rules = Rules.parse([("exclude", "swap")])
    found = resolve(rules, disk, block_size=4096)
    assert [(part.start, part.end) for part in found.excluded] == [
        (start + 64 * 1024, start + 4 * 64 * 1024)  # the header is kept
    ]
    readers = WorkerReaders(total_s=0)
    late = resolve(rules, disk, block_size=4096, readers=readers)
    assert late.excluded == ()
    (note,) = late.notes
    assert "opaque and kept whole: the 0 s for all readers together were over" in note


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"vg0": None},
        {"vg0": {"id": True}},
        {"vg0": {"id": 1.5}},
        {"vg0": {"tags": [["nested"]]}},
        nested(40),
    ],
)
def test_an_answer_that_is_no_text_of_a_volume_group_is_not_believed(document: object) -> None:
    with pytest.raises(WireError):
        _section(document, depth=0)


# What a worker that was taken over may say --------------------------------------------------------


def answer(**changes: object) -> dict[str, object]:
    identity = {
        "kind": "ext4",
        "label": "",
        "uuid": "",
        "block_size": 4096,
        "size": MIB,
        "is_case_sensitive": True,
    }
    tally = {
        "file_count": 1,
        "file_bytes": 1,
        "unmapped_count": 0,
        "unmapped_reason": "",
        "linked_count": 0,
    }
    return {
        "identity": identity,
        "caveats": [],
        "groups": [[0]],
        "counts": [1, 0, 0, 0],
        "tallies": [tally, tally],
        "files_reason": "",
        "free_reason": "",
    } | changes


GOOD = [4096, 8192]


@pytest.mark.parametrize(
    ("document", "numbers"),
    [
        (None, GOOD),
        ({}, GOOD),
        (answer(identity=None), GOOD),
        (answer(groups=[[2]]), GOOD),
        (answer(groups=[[-1]]), GOOD),
        (answer(groups=[["0"]]), GOOD),
        (answer(groups=[]), GOOD),
        (answer(counts=[2, 0, 0, 0]), GOOD),
        (answer(counts=[2, -1, 0, 0]), GOOD),
        (answer(counts=[1, 0, 0]), GOOD),
        (answer(tallies=[]), GOOD),
        (answer(tallies=[{"file_count": -1}, {}]), GOOD),
        (answer(caveats="x"), GOOD),
        (answer(files_reason=5), GOOD),
        (answer(), [8192, 4096]),
        (answer(), [4096, 4096]),
        (answer(), [4096, MIB + 1]),
        (answer(counts=[2, 0, 0, 0]), [0, 8192, 4096, 9000]),
        (answer(counts=[2, 0, 0, 0]), [0, 8192, 8192, 9000]),
    ],
)
def test_an_answer_that_breaks_the_form_is_refused(document: object, numbers: list[int]) -> None:
    payload = pack_document(document) + array("Q", numbers).tobytes()
    found, found_numbers = unpack_document(payload)
    with pytest.raises((WireError, CodecError)):
        _survey(found, found_numbers, request=REQUEST, size=MIB)


def test_an_answer_of_good_form_is_taken_and_its_text_cut() -> None:
    document = answer(files_reason="x" * 10_000)
    found, numbers = unpack_document(pack_document(document, [((4096, 8192),)]))
    survey = _survey(found, numbers, request=REQUEST, size=MIB)
    assert survey.groups[0].extents == ((4096, 8192),)
    assert len(survey.files_reason) < 1000


@pytest.mark.parametrize(
    "data",
    [
        HEADER.pack(99, 0),
        HEADER.pack(Kind.ANSWER, FRAME_BYTES_MAX + 1),
        struct.pack("<BBBBI", Kind.ANSWER, 0, 0, 0, 0xFFFFFFFF),
    ],
)
def test_a_frame_that_is_none_is_refused_before_its_payload_is_taken(data: bytes) -> None:
    def take(length: int) -> bytes:
        nonlocal data
        assert length <= len(data)
        taken, data = data[:length], data[length:]
        return taken

    with pytest.raises(WireError):
        receive(take)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x05\0\0\0{}",
        b"\x02\0\0\0{}x",
        b"\x02\0\0\0{!",
        b"\x02\0\0\0\xff\xff",
        struct.pack("<I", 200_000) + b"[" * 200_000,
    ],
)
def test_a_document_that_is_none_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        unpack_document(payload)
