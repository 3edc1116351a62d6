"""The peers: qemu-nbd, nbdkit, and qemu-storage-daemon plain and with copy-before-write."""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from bench import fields, nbd
from bench.errors import MissingToolError, PeerError
from bench.process import ServerProcess, run_tool
from bench.qmp import Qmp
from bench.targets import Place, Role, Target, TargetName
from bench.units import BLOCK_BYTES

BITMAP_GRANULARITY_MAX = 1 << 30
EXPORT_GONE_TIMEOUT_S = 10.0

Node = dict[str, object]


def tool(name: str, *, package: str) -> str:
    """The path of a program; raise MissingToolError naming the Debian package that has it."""
    # Debian moved qemu-storage-daemon between packages; wherever it is, it may lie outside a
    # user's PATH.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/libexec:/usr/lib/qemu")
    if found is None:
        raise MissingToolError(f"{name} is not installed (Debian: {package})")
    return found


def qemu_storage_daemon() -> str:
    """The path of qemu-storage-daemon, or MissingToolError."""
    return tool("qemu-storage-daemon", package="qemu-utils, or qemu-system-common before trixie")


class QemuNbd(Target):
    """qemu-nbd on the raw image."""

    def launch(self) -> ServerProcess:
        cache = "none" if self.place.is_direct else "writeback"
        return ServerProcess(
            [
                tool("qemu-nbd", package="qemu-utils"),
                *("-f", "raw", "-k", str(self.socket_path), "-t", "-e", "8"),
                *(f"--cache={cache}", f"--aio={self.place.qemu_aio}", str(self.place.image)),
            ],
            log=self.log,
        )


class Nbdkit(Target):
    """nbdkit's file plugin on the raw image; it has no way around the page cache."""

    can_direct = False

    def launch(self) -> ServerProcess:
        program = tool("nbdkit", package="nbdkit")
        return ServerProcess(
            [program, "-f", "-U", str(self.socket_path), "file", str(self.place.image)],
            log=self.log,
            environment={"TMPDIR": str(self.directory)},
        )


class StorageDaemon(Target):
    """qemu-storage-daemon on the raw image, steered through its monitor."""

    def __init__(self, name: TargetName, *, place: Place) -> None:
        super().__init__(name, place=place)
        self._monitor: Qmp | None = None

    def call(self, command: str, **arguments: object) -> object:
        """Run a monitor command; underscores in argument names stand for hyphens."""
        assert self._monitor is not None, "the server was not started"
        return self._monitor.call(command, {k.replace("_", "-"): v for k, v in arguments.items()})

    def launch(self) -> ServerProcess:
        monitor = self.directory / "qmp.sock"
        command = [
            qemu_storage_daemon(),
            *("--chardev", f"socket,id=m,path={monitor},server=on,wait=off"),
            *("--monitor", "chardev=m"),
        ]
        for node in (
            self.file_node("f0", self.place.image),
            {"driver": "raw", "node-name": "top", "file": "f0"},
        ):
            command += ["--blockdev", json.dumps(node)]
        command += [
            *("--nbd-server", f"addr.type=unix,addr.path={self.socket_path},max-connections=16"),
            *("--export", "type=nbd,id=e0,node-name=top,writable=on,name="),
        ]
        process = ServerProcess(command, log=self.log)
        try:
            self._monitor = Qmp(monitor)
        except BaseException:
            process.stop()
            raise
        return process

    def stop(self) -> None:
        if self._monitor is not None:
            with contextlib.suppress(OSError):
                self._monitor.close()
            self._monitor = None
        super().stop()

    def file_node(self, name: str, path: Path) -> Node:
        """A node on a file, with the caching and the I/O engine of this run."""
        node: Node = {
            "driver": "file",
            "node-name": name,
            "filename": str(path),
            "aio": self.place.qemu_aio,
        }
        if self.place.is_direct:
            node["cache"] = {"direct": True}
        return node

    def backup_changed(self, *, bitmap: str, out: Path) -> None:
        """Write what the bitmap names into a new qcow2 file."""
        assert self._monitor is not None, "the server was not started"
        qemu_img = tool("qemu-img", package="qemu-utils")
        size = str(self.place.size_bytes)
        run_tool([qemu_img, "create", "-q", "-f", "qcow2", str(out), size])
        file_node = self.file_node(f"file-{bitmap}", out)
        self.call("blockdev-add", driver="qcow2", file=file_node, node_name=f"out-{bitmap}")
        self.call(
            "blockdev-backup",
            device="top",
            target=f"out-{bitmap}",
            sync="bitmap",
            bitmap=bitmap,
            job_id=f"job-{bitmap}",
            bitmap_mode="on-success",
        )
        ended = self._monitor.wait_event("BLOCK_JOB_COMPLETED")
        self.call("blockdev-del", node_name=f"out-{bitmap}")
        if ended.get("error"):
            raise PeerError(f"blockdev-backup: {ended['error']}")


class CopyBeforeWrite(StorageDaemon):
    """QEMU's image fleecing: raw top -> copy-before-write -> disk.

    Originals go to a sparse raw file in clusters of 64 KiB; the snapshot-access node is exported.
    Several snapshots are several filters, each with its own file. With the role HALF a coarse
    dirty bitmap says what to preserve: the only selection QEMU has.
    """

    plain_role: ClassVar[Role] = Role.SNAPSHOT

    def __init__(self, name: TargetName, *, place: Place) -> None:
        super().__init__(name, place=place)
        self._lowest = "f0"

    def take_snapshot(self, number: int, *, extents: list[tuple[int, int]] | None = None) -> None:
        if extents is not None:
            self._mark_bitmap(extents)
        kept = self._kept_file(number)
        begin = time.perf_counter()
        with kept.open("wb") as file:
            file.truncate(self.place.size_bytes)
        self.call("blockdev-add", **_underscored(self.file_node(f"t{number}", kept)))
        filter_node: Node = {
            "driver": "copy-before-write",
            "node_name": f"cbw{number}",
            "file": self._lowest,
            "target": f"t{number}",
        }
        if extents is not None:
            filter_node["bitmap"] = {"node": "f0", "name": "selected"}
        self.call("blockdev-add", **filter_node)
        self._put_under_top(f"cbw{number}")
        self.snapshot_s = time.perf_counter() - begin
        access = f"acc{number}"
        self.call("blockdev-add", driver="snapshot-access", node_name=access, file=f"cbw{number}")
        self.call(
            "block-export-add", type="nbd", id=f"e{number}", name=f"snap{number}", node_name=access
        )
        self.view_ready_s = time.perf_counter() - begin
        self._lowest = f"cbw{number}"
        self.view_uri = self.view_uri or nbd.unix_uri(self.socket_path, f"snap{number}")

    def delete_snapshot(self, number: int) -> None:
        self.call("block-export-del", id=f"e{number}", mode="hard")
        deadline = time.monotonic() + EXPORT_GONE_TIMEOUT_S
        while f"e{number}" in self._export_ids():
            if time.monotonic() > deadline:
                raise PeerError(f"export e{number} is still there")
            time.sleep(0.005)
        self.call("blockdev-del", node_name=f"acc{number}")
        self._put_under_top("f0")
        self.call("blockdev-del", node_name=f"cbw{number}")
        self.call("blockdev-del", node_name=f"t{number}")
        self._kept_file(number).unlink()
        self._lowest = "f0"

    def store_bytes(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in self.directory.glob("kept*.raw"))

    def _kept_file(self, number: int) -> Path:
        return self.directory / f"kept{number}.raw"

    def _put_under_top(self, node: str) -> None:
        options = [{"driver": "raw", "node-name": "top", "file": node}]
        self.call("blockdev-reopen", options=options)

    def _export_ids(self) -> list[str]:
        exports = fields.sequence(self.call("query-block-exports"), "query-block-exports")
        return [fields.text(fields.mapping(e, "export").get("id"), "export id") for e in exports]

    def _mark_bitmap(self, extents: Sequence[tuple[int, int]]) -> None:
        """Set the bits of the extents the only way there is: write one block under each back as
        it is."""
        shortest = min(end - start for start, end in extents)
        granularity = min(BITMAP_GRANULARITY_MAX, 1 << (shortest.bit_length() - 1))
        self.call("block-dirty-bitmap-add", node="f0", name="selected", granularity=granularity)
        with nbd.NbdClient(self.uri) as client:
            for start, end in extents:
                for offset in range(start, end, granularity):
                    data = client.pread(offset=offset, length=BLOCK_BYTES)
                    client.pwrite(data, offset=offset)
        self.call("block-dirty-bitmap-disable", node="f0", name="selected")


def _underscored(node: Node) -> Node:
    return {key.replace("-", "_"): value for key, value in node.items()}
