"""What every server under test has in common: a name with a role, a life, snapshots."""

import enum
import shutil
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench import nbd
from bench.errors import PeerError, UsageError
from bench.process import ServerProcess

SETTLE_READINGS_MAX = 30
VIEW_TIMEOUT_S = 30.0


class Role(enum.Enum):
    """In which state a server is measured."""

    RAW = "raw"
    """No snapshot."""
    SNAPSHOT = "snapshot"
    """One snapshot of everything."""
    SEVERAL = "several"
    """Several snapshots of everything with nothing written between them."""
    HALF = "half"
    """One snapshot of quarters 1 and 3 of the disk."""
    BOOKMARK = "bookmark"
    """A bookmark of everything, its snapshot deleted: changes are tracked, nothing is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetName:
    """`stillblock`, `stillblock@raw`, `@half`, `@bookmark`, `@k8`: a server and the role it
    plays."""

    server: str
    role: Role
    snapshot_count: int

    @classmethod
    def parse(cls, text: str, *, plain_role: Role) -> "TargetName":
        """Read a name; `plain_role` is what the server does without a suffix. Raise UsageError."""
        server, at, suffix = text.partition("@")
        if not at:
            count = 0 if plain_role is Role.RAW else 1
            return cls(server=server, role=plain_role, snapshot_count=count)
        if suffix == "raw":
            return cls(server=server, role=Role.RAW, snapshot_count=0)
        if suffix == "half":
            return cls(server=server, role=Role.HALF, snapshot_count=1)
        if suffix == "bookmark":
            return cls(server=server, role=Role.BOOKMARK, snapshot_count=1)
        if suffix.startswith("k") and suffix[1:].isdecimal() and int(suffix[1:]) > 1:
            return cls(server=server, role=Role.SEVERAL, snapshot_count=int(suffix[1:]))
        raise UsageError(f"{text}: no such role; write @raw, @half, @bookmark or @k8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where and under which conditions servers run."""

    scratch: Path
    image: Path
    is_direct: bool
    qemu_aio: str

    @property
    def size_bytes(self) -> int:
        return self.image.stat().st_size


def quarters(size_bytes: int) -> list[tuple[int, int]]:
    """The extents that the role HALF selects: quarters 1 and 3."""
    quarter = size_bytes // 4
    return [(0, quarter), (2 * quarter, 3 * quarter)]


class Target(ABC):
    """One life of one server. `start`, measure, `stop`; the directory is empty at each start."""

    plain_role: ClassVar[Role] = Role.RAW
    can_direct: ClassVar[bool] = True
    """Whether the server has a way around the page cache."""

    def __init__(self, name: TargetName, *, place: Place) -> None:
        self.name = name
        self.place = place
        self.directory = place.scratch / "server"
        self.socket_path = self.directory / "nbd.sock"
        self.log = place.scratch / f"{name.server}.log"
        self.uri = nbd.unix_uri(self.socket_path)
        self.view_uri: str | None = None
        self.snapshot_s: float | None = None
        """How long the last snapshot took until it was in force."""
        self.view_ready_s: float | None = None
        """How long the last snapshot took until it could be read."""
        self._process: ServerProcess | None = None

    @property
    def role(self) -> Role:
        return self.name.role

    @property
    def process(self) -> ServerProcess:
        assert self._process is not None, "the server was not started"
        return self._process

    def start(self) -> None:
        """Start the server on the image and wait until it answers."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        self._process = self.launch()
        nbd.wait_until_served(self.uri, process=self._process)

    def stop(self) -> None:
        """End the server and take away all it left. Harmless after a failed start."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def enter_role(self) -> None:
        """Take the snapshots that the role asks for and wait until the view answers."""
        for number in range(1, self.name.snapshot_count + 1):
            if self.role is Role.HALF:
                self.take_snapshot(number, extents=quarters(self.place.size_bytes))
            else:
                self.take_snapshot(number)
        if self.role is Role.BOOKMARK:
            self.leave_bookmark(1)
        if self.view_uri is not None:
            self._wait_for_view(self.view_uri)

    @abstractmethod
    def launch(self) -> ServerProcess:
        """Start the server's process."""

    def take_snapshot(self, number: int, *, extents: list[tuple[int, int]] | None = None) -> None:
        """Take snapshot `number`, of everything or of the extents; return when it is in force."""
        share = "everything" if extents is None else f"{len(extents)} extents"
        raise PeerError(f"{self.name.server}: no snapshot {number} of {share}: it takes none")

    def delete_snapshot(self, number: int) -> None:
        """Delete snapshot `number`."""
        raise PeerError(f"{self.name.server}: no snapshot {number} to delete: it takes none")

    def leave_bookmark(self, number: int) -> None:
        """Go on tracking what changes since snapshot `number`, and delete it."""
        raise PeerError(f"{self.name.server}: no bookmark of snapshot {number}: it has none")

    def store_bytes(self) -> int | None:
        """Bytes kept for snapshots now, preallocated space left out; None if it cannot tell."""
        return None

    def settle(self) -> None:
        """Flush, so that work put off counts for the workload that caused it."""
        nbd.flush(self.uri)

    def settled_store_bytes(self) -> int | None:
        """Bytes kept, once two readings agree."""
        before = self.store_bytes()
        for _ in range(SETTLE_READINGS_MAX if before is not None else 0):
            time.sleep(0.1)
            now = self.store_bytes()
            if now == before:
                break
            before = now
        return before

    def _wait_for_view(self, view_uri: str) -> None:
        begin = time.perf_counter()
        while True:
            try:
                nbd.NbdClient(view_uri).close()
                break
            except (OSError, PeerError):
                if time.perf_counter() - begin > VIEW_TIMEOUT_S:
                    raise
                time.sleep(0.002)
        if self.view_ready_s is None and self.snapshot_s is not None:
            self.view_ready_s = self.snapshot_s + time.perf_counter() - begin
