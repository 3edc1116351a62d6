"""The demo's story, in order: a disk, a snapshot, a bad day, proofs, the way back, words, the bill.

Every line with a tick is a comparison of real bytes that was just made; the first one that does not
hold ends the demo with exit 1 and a sentence that says what was wrong.
"""

import contextlib
import io
import json as json_codec
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from rich.console import Console

from stillblock.demo import comparison, edits
from stillblock.demo.comparison import BLOCK_BYTES, Expectation
from stillblock.demo.disk import (
    MIB,
    Partition,
    ToolMissing,
    e2fsprogs,
    gather_library,
    layout,
    make_disk,
    mkfs_command,
)
from stillblock.demo.narration import Narrator, sized
from stillblock.demo.nbd_client import NbdClient, NbdError
from stillblock.demo.session import STOP_TIMEOUT_S, DemoFailed, Session, stop
from stillblock.demo.words import tell_words

DISK_BYTES: Final = 256 * MIB
SWAP_SCRIBBLE_BYTES: Final = 16 * MIB
# Fixed, so that two runs tell the same story and a failure can be looked at twice.
SEED: Final = 20_261_122
VOLUME: Final = "web"
SNAPSHOT: Final = "web@monday"


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What was proved and what it cost; printed at the end."""

    proofs: list[str] = field(default_factory=list)
    blocks_changed: int = 0
    """Distinct blocks of the disk that were written after the instant."""
    blocks_changed_selected: int = 0
    writes: int = 0
    blocks_preserved: int = 0
    store_bytes: int = 0
    pause_ms: float = 0.0
    snapshot_reads: int = 0
    """Whole passes over the snapshot while the disk was being written."""
    seconds: float = 0.0


def main(*, keep: Path | None = None, json: bool = False, quiet: bool = False) -> int:
    """Run the demo and return its exit code; `keep` is a directory to leave everything in."""
    console = Console(highlight=False, file=io.StringIO() if json or quiet else None)
    started = time.monotonic()
    outcome = Outcome()
    error_text = ""
    try:
        for command in ("mkfs.ext4", "debugfs", "e2fsck"):
            e2fsprogs(command)
        with _folder(keep) as folder:
            _Story(folder=folder, narrator=Narrator(console), outcome=outcome).tell()
            outcome.seconds = round(time.monotonic() - started, 2)
            _bill(Narrator(console), outcome)
            if keep is not None:
                console.print(f"Everything is left in {folder}.", markup=False)
    except (DemoFailed, ToolMissing, NbdError) as error:
        error_text = str(error)
    except (OSError, RuntimeError) as error:
        error_text = f"the demo could not go on: {error}"
    if json:
        fields = {"schema": "stillblock/1", "kind": "demo", "ok": not error_text}
        reason = {"error": error_text} if error_text else {}
        print(json_codec.dumps(fields | asdict(outcome) | reason))  # noqa: T201 - its result
    if error_text:
        print(f"stillblock demo: {error_text}", file=sys.stderr)  # noqa: T201 - its last word
    return 1 if error_text else 0


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Yield an empty directory; a temporary one is gone afterwards."""
    if keep is None:
        # A short path: a socket's is limited to 107 bytes.
        with tempfile.TemporaryDirectory(prefix="stillblock-demo-") as name:
            yield Path(name).resolve()
        return
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise DemoFailed(f"{keep} is not empty; name a new directory to keep the demo in")
    yield keep.resolve()


class _SnapshotReader(threading.Thread):
    """Reads the snapshot over and over while the disk is written, and compares every byte."""

    def __init__(self, *, socket_path: str, expected: Expectation) -> None:
        super().__init__(name="snapshot reader", daemon=True)
        self._socket_path = socket_path
        self._expected = expected
        self._is_enough = threading.Event()
        self.passes = 0
        self.error: str | None = None

    def run(self) -> None:
        try:
            with NbdClient(socket_path=self._socket_path, export=SNAPSHOT) as client:
                while not (self._is_enough.is_set() and self.passes):
                    wrong = comparison.first_difference(
                        _reading(client), self._expected, start=0, end=client.size_bytes
                    )
                    if wrong is not None:
                        self.error = f"byte {wrong} of {SNAPSHOT} changed while web was written"
                        return
                    self.passes += 1
        except (OSError, NbdError) as error:
            self.error = f"reading {SNAPSHOT} while web was written failed: {error}"

    def finish(self) -> int:
        """Let the pass that runs end; return how many there were."""
        self._is_enough.set()
        self.join()
        if self.error:
            raise DemoFailed(self.error)
        return self.passes


def _reading(client: NbdClient) -> Expectation:
    return lambda start, end: client.pread(offset=start, length=end - start)


def _stored(file: BinaryIO) -> Expectation:
    return lambda start, end: comparison.read_range(file, start, end)


class _Story:
    """One telling; each step leaves behind what the next one needs."""

    def __init__(self, *, folder: Path, narrator: Narrator, outcome: Outcome) -> None:
        self.folder = folder
        self.narrator = narrator
        self.outcome = outcome
        self.session = Session(folder=folder, narrator=narrator)
        self.disk = folder / "disk.img"
        self.before = folder / "before.img"
        self.files = folder / "files"
        self.swap, self.filesystem = layout(size_bytes=DISK_BYTES)
        self.swap_noise = random.Random(SEED).randbytes(SWAP_SCRIBBLE_BYTES)

    def tell(self) -> None:
        self.narrator.title("stillblock: keep the blocks that matter, as they were at one instant")
        self._make_the_disk()
        self._register()
        with self.session.server(VOLUME) as (server, socket_path):
            self._take_the_snapshot()
            self._live_through_a_bad_day(socket_path)
            self._look_back(socket_path)
            self._count_the_cost()
            self._restore(socket_path)
            self._say_it_in_words(socket_path)
            self._release(server)
        self._use_the_raw_disk()

    def _make_the_disk(self) -> None:
        self.narrator.step("A disk: a swap partition, and an ext4 filesystem with real files")
        file_count = gather_library(self.files)
        self.narrator.command(
            mkfs_command(image="disk.img", partition=self.filesystem, files="files"),
            note=f"{file_count} files of Python's library",
        )
        make_disk(self.disk, size_bytes=DISK_BYTES, files=self.files, seed=SEED)
        self.session.shell(["cp", "disk.img", "before.img"], note="put aside, to compare with")

    def _register(self) -> None:
        self.narrator.step("Serve it, and keep Monday: everything but the swap")
        self.session.stillblock(
            "volume", "add", VOLUME, "--origin", "disk.img", "--store", "web.store"
        )

    def _take_the_snapshot(self) -> None:
        self.session.stillblock("snapshot", "create", SNAPSHOT, "--exclude", "part:type=swap")
        pause_ns = self.session.ask("snapshot", "receipt", SNAPSHOT).get("pause_ns") or 0
        self.outcome.pause_ms = round(pause_ns / 1e6, 3)
        self.narrator.remark(f"Writers waited {self.outcome.pause_ms} ms; nothing was copied.")

    def _live_through_a_bad_day(self, socket_path: str) -> None:
        """Change the live disk through NBD while the snapshot is read by two clients."""
        self.narrator.step("A bad day: change the disk through NBD while the snapshot is read")
        day = edits.plan_edits(self.files, seed=SEED)
        work = self.folder / "work.img"
        self._read_live(socket_path, into=work)
        edits.apply_edits(
            day, image=work, partition=self.filesystem, files=self.files,
            script=self.folder / edits.SCRIPT, seed=SEED,
        )  # fmt: skip
        self.narrator.command(
            ["debugfs", "-w", "-f", edits.SCRIPT, edits.image_at("work.img", self.filesystem)],
            note=day.describe(),
        )
        changed = list(
            comparison.differing_blocks(
                self.before, work, start=self.filesystem.start, end=self.filesystem.end
            )
        )
        with self.before.open("rb") as before:
            expected = comparison.zeroed(_stored(before), start=self.swap.start, end=self.swap.end)
            reader = _SnapshotReader(socket_path=socket_path, expected=expected)
            reader.start()
            copier = self._start_nbdcopy(socket_path)
            try:
                self._write_changes(socket_path, changed=changed, work=work)
            finally:
                self.outcome.snapshot_reads = reader.finish()
                if copier is not None:
                    self._wait_for_nbdcopy(copier)
        self.outcome.blocks_changed_selected = comparison.block_count(changed)
        self.outcome.blocks_changed = (
            self.outcome.blocks_changed_selected + SWAP_SCRIBBLE_BYTES // BLOCK_BYTES
        )
        self.narrator.remark(
            f"{self.outcome.writes} writes: the {self.outcome.blocks_changed_selected} blocks that "
            f"differ, twice over, and {sized(SWAP_SCRIBBLE_BYTES)} of new swap."
        )
        self._prove(
            f"read whole {self.outcome.snapshot_reads}x meanwhile, no byte of the snapshot moved",
            detail=sized(self.outcome.snapshot_reads * DISK_BYTES),
        )

    def _write_changes(
        self, socket_path: str, *, changed: list[comparison.Extent], work: Path
    ) -> None:
        """Write noise, then what the filesystem says: only the first write costs a copy."""
        noise = random.Random(SEED + 1)
        with NbdClient(socket_path=socket_path, export=VOLUME) as client, work.open("rb") as new:
            for start, end in changed:
                client.pwrite(noise.randbytes(end - start), offset=start)
            for start, end in changed:
                client.pwrite(comparison.read_range(new, start, end), offset=start)
            # Not its first page: what makes it a swap area stays.
            for piece, piece_end in comparison.chunks(0, SWAP_SCRIBBLE_BYTES):
                client.pwrite(
                    self.swap_noise[piece:piece_end], offset=self.swap.start + BLOCK_BYTES + piece
                )
            client.flush()
        self.outcome.writes = 2 * len(changed) + SWAP_SCRIBBLE_BYTES // comparison.CHUNK_BYTES

    def _look_back(self, socket_path: str) -> None:
        """Prove that the snapshot is Monday, that swap was not kept, that the disk moved on."""
        self.narrator.step("Look back: is it Monday, byte for byte?")
        monday = self.folder / "monday.img"
        if not monday.exists():
            with NbdClient(socket_path=socket_path, export=SNAPSHOT) as client:
                client.copy_to(monday)
        with monday.open("rb") as kept, self.before.open("rb") as before:
            size = self.filesystem.size_bytes
            self._require_same(
                _stored(kept), _stored(before), self.filesystem,
                f"partition 2 of {SNAPSHOT} is not the copy taken before",
            )  # fmt: skip
            self._prove("partition 2 of the snapshot is the copy taken before", detail=sized(size))
            self._require_same(
                _stored(kept), lambda start, end: bytes(end - start), self.swap,
                f"the swap of {SNAPSHOT} should read as zeros",
            )  # fmt: skip
            self._prove("the swap in it reads as zeros", detail=sized(self.swap.size_bytes))
        self._prove_that_swap_is_a_hole(socket_path)
        with NbdClient(socket_path=socket_path, export=VOLUME) as live:
            self._require_live_changed(live)
        checked = edits.image_at("monday.img", self.filesystem)
        self.session.shell(["e2fsck", "-fn", checked])
        self._prove("e2fsck finds no fault with the snapshot's filesystem")
        self._prove_that_a_deleted_file_is_there(checked)

    def _prove_that_swap_is_a_hole(self, socket_path: str) -> None:
        if shutil.which("nbdinfo") is None:
            return
        uri = self._uri(SNAPSHOT, socket_path)
        extents = json_codec.loads(
            self.session.shell(["nbdinfo", "--map", "--json", uri], is_shown=False)
        )
        self.narrator.command(["nbdinfo", "--map", uri])
        holes = [
            (extent["offset"], extent["offset"] + extent["length"])
            for extent in extents
            if extent["type"] & 1
        ]
        position = self.swap.start
        for start, end in sorted(holes):
            if start <= position:
                position = max(position, end)
        if position < self.swap.end:
            raise DemoFailed(
                f"nbdinfo shows data at {position} of {SNAPSHOT}, in the swap that was excluded"
            )
        self._prove("and nbdinfo shows it as a hole")

    def _prove_that_a_deleted_file_is_there(self, image: str) -> None:
        day = edits.plan_edits(self.files, seed=SEED)
        name = next((name for name in day.deleted if name.count("/") > 1), day.deleted[0])
        folder, _, leaf = name.rpartition("/")
        self.narrator.command(["debugfs", "-R", f"ls -l {folder or '/'}", image])
        found = self.folder / leaf
        listing = edits.run_debugfs(
            [f"ls -l {folder or '/'}", f"dump {name} {found}"],
            image=str(self.folder / image), may_write=False,
            script_file=self.folder / "look.debugfs",
        )  # fmt: skip
        for line in listing.splitlines():
            if line.split()[-1:] == [leaf]:
                self.narrator.output(line.strip())
        if found.read_bytes() != (self.files / name[1:]).read_bytes():
            raise DemoFailed(f"{name}, deleted from the disk, is not itself in {SNAPSHOT}")
        self._prove(f"{name}, deleted from the disk, is whole in the snapshot")

    def _count_the_cost(self) -> None:
        """Read what was preserved, before a restore adds its own safety snapshot."""
        shown = self.session.ask("snapshot", "show", SNAPSHOT)
        volume = self.session.ask("volume", "show", VOLUME)
        self.outcome.blocks_preserved = int(_find(shown, "preserved_bytes")) // BLOCK_BYTES
        self.outcome.store_bytes = int(_find(volume, "store_bytes"))
        if not 0 < self.outcome.blocks_preserved <= self.outcome.blocks_changed_selected:
            raise DemoFailed(
                f"{self.outcome.blocks_preserved} blocks were preserved, where "
                f"{self.outcome.blocks_changed_selected} selected ones changed"
            )
        self._prove(
            "each changed block was preserved once, and none of the swap",
            detail=f"{self.outcome.blocks_preserved} of {self.outcome.blocks_changed} changed",
        )

    def _restore(self, socket_path: str) -> None:
        self.narrator.step("The way back: Monday again, in place, while it is served")
        self.session.stillblock("restore", "run", SNAPSHOT, "--yes")
        self._wait_for_restore()
        with (
            NbdClient(socket_path=socket_path, export=VOLUME) as live,
            self.before.open("rb") as before,
        ):
            self._require_same(
                _reading(live), _stored(before), self.filesystem,
                "after the restore partition 2 of web is not the copy taken before",
            )  # fmt: skip
            size = self.filesystem.size_bytes
            self._prove("partition 2 of the live disk is the copy taken before", detail=sized(size))
            self._require_swap_untouched(_reading(live))
            self._prove("the swap kept what was written to it since")

    def _wait_for_restore(self) -> None:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            if not _find(self.session.ask("restore", "status", VOLUME), "is_running"):
                return
        raise DemoFailed(f"the restore was still running after {STOP_TIMEOUT_S:.0f} s")

    def _say_it_in_words(self, socket_path: str) -> None:
        for claim, detail in tell_words(
            self.session, self.narrator, files=self.files, filesystem=self.filesystem,
            connect=lambda export: NbdClient(socket_path=socket_path, export=export),
        ):  # fmt: skip
            self._prove(claim, detail=detail)

    def _release(self, server: "subprocess.Popen[bytes]") -> None:
        self.narrator.step("Let go: from here on it is a plain raw disk")
        for line in self.session.stillblock("volume", "release", VOLUME).splitlines()[:2]:
            self.narrator.output(line)
        stop(server)

    def _use_the_raw_disk(self) -> None:
        self.session.shell(["e2fsck", "-fn", edits.image_at("disk.img", self.filesystem)])
        with self.disk.open("rb") as disk, self.before.open("rb") as before:
            self._require_same(
                _stored(disk), _stored(before), self.filesystem,
                "after the release partition 2 of disk.img is not the copy taken before",
            )  # fmt: skip
            self._require_swap_untouched(_stored(disk))
        self._prove("disk.img itself holds it all, and e2fsck finds no fault")

    def _read_live(self, socket_path: str, *, into: Path) -> None:
        if shutil.which("nbdcopy"):
            self.session.shell(["nbdcopy", self._uri(VOLUME, socket_path), into.name])
            return
        self.narrator.remark("(nbdcopy is not installed; the demo's own client reads)")
        with NbdClient(socket_path=socket_path, export=VOLUME) as client:
            client.copy_to(into)

    def _start_nbdcopy(self, socket_path: str) -> "subprocess.Popen[bytes] | None":
        if shutil.which("nbdcopy") is None:
            return None
        return self.session.start(["nbdcopy", self._uri(SNAPSHOT, socket_path), "monday.img"])

    @staticmethod
    def _wait_for_nbdcopy(copier: "subprocess.Popen[bytes]") -> None:
        try:
            _, complaint = copier.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            stop(copier)
            raise DemoFailed(f"nbdcopy of {SNAPSHOT} did not end") from error
        if copier.returncode:
            words = complaint.decode(errors="replace").strip()
            raise DemoFailed(f"nbdcopy of {SNAPSHOT} failed: {words}")

    def _require_live_changed(self, live: NbdClient) -> None:
        with self.before.open("rb") as before:
            same = comparison.first_difference(
                _reading(live), _stored(before),
                start=self.filesystem.start, end=self.filesystem.end,
            )  # fmt: skip
        if same is None:
            raise DemoFailed("the live disk did not change: nothing was proved")
        self._require_swap_untouched(_reading(live))
        self._prove("the live disk has moved on")

    def _require_swap_untouched(self, read: Expectation) -> None:
        start = self.swap.start + BLOCK_BYTES
        wrong = comparison.first_difference(
            read, lambda low, high: self.swap_noise[low - start : high - start],
            start=start, end=start + SWAP_SCRIBBLE_BYTES,
        )  # fmt: skip
        if wrong is not None:
            raise DemoFailed(f"byte {wrong}, in the swap, is not what was written to it last")

    @staticmethod
    def _require_same(
        found: Expectation, expected: Expectation, within: Partition, sentence: str
    ) -> None:
        wrong = comparison.first_difference(found, expected, start=within.start, end=within.end)
        if wrong is not None:
            raise DemoFailed(f"{sentence}: they differ first at byte {wrong} of the disk")

    def _uri(self, export: str, socket_path: str) -> str:
        """Return what stock clients take; the commands run in the demo's directory."""
        path = Path(socket_path)
        near = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
        return f"nbd+unix:///{export}?socket={near}"

    def _prove(self, claim: str, *, detail: str = "") -> None:
        self.outcome.proofs.append(claim)
        self.narrator.proof(claim, detail=detail)


def _find(document: Any, name: str) -> Any:
    """Return the first field of that name, at any depth."""
    if isinstance(document, dict) and name in document:
        return document[name]
    nested: list[Any] = []
    if isinstance(document, dict):
        nested = list(document.values())
    elif isinstance(document, list):
        nested = document
    for value in nested:
        found = _find(value, name)
        if found is not None:
            return found
    return None


def _bill(narrator: Narrator, outcome: Outcome) -> None:
    narrator.table(
        "What was preserved",
        [
            ("blocks written after the instant", f"{outcome.blocks_changed:,}"),
            ("of them selected, and so worth keeping", f"{outcome.blocks_changed_selected:,}"),
            ("blocks preserved", f"{outcome.blocks_preserved:,}"),
        ],
    )
    narrator.table(
        "What it cost",
        [
            ("kept in the store", sized(outcome.store_bytes)),
            ("a copy of the disk would be", sized(DISK_BYTES)),
            ("writers paused", f"{outcome.pause_ms} ms"),
        ],
    )
    narrator.closing(f"{len(outcome.proofs)} proofs, all of them held, in {outcome.seconds:.1f} s.")
