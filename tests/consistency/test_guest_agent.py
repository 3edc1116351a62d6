"""The guest agent: one that answers, one that never does, one that is late, and the real one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from mounted import formatted, mounted, require_mounts
from processes import WAIT_S, running, wait_gone, wait_until
from serving import run
from stillblock.consistency import agent
from stillblock.errors import QuiesceError
from stillblock.operations.consistency import ConsistencyRequest, set_consistency


class Guest:
    """An agent that does as the protocol says, unless a test tells it otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_frozen = False
        self.frozen_mounts: list[str] | None = None
        self.heard: list[str] = []
        self.mute: set[str] = set()
        """Commands that get no answer."""
        self.delay_until: dict[str, threading.Event] = {}
        """Commands whose answer comes when the event does, whoever listens by then."""
        self.thawed = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(WAIT_S)

    def _serve(self) -> None:
        # As a virtio channel: bytes that nobody fetched are there for the next one to connect.
        stale = b""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(stale)
                stale = self._talk(connection)

    def _talk(self, connection: socket.socket) -> bytes:
        rest = b""
        while True:
            try:
                data = connection.recv(4096)
            except OSError:
                return b""
            if not data:
                return b""
            rest += data
            while b"\n" in rest:
                line, _, rest = rest.partition(b"\n")
                question = json.loads(line.rpartition(b"\xff")[2])
                name = question["execute"]
                self.heard.append(name)
                answer = self._answer(name, question.get("arguments", {}))
                if name in self.mute:
                    continue
                if name in self.delay_until:
                    assert self.delay_until.pop(name).wait(WAIT_S)
                try:
                    connection.sendall(answer)
                except OSError:
                    return answer

    def _answer(self, name: str, arguments: dict) -> bytes:
        if name == "guest-sync-delimited":
            return b"\xff" + json.dumps({"return": arguments["id"]}).encode() + b"\n"
        if name in {"guest-fsfreeze-freeze", "guest-fsfreeze-freeze-list"}:
            self.is_frozen, self.frozen_mounts = True, arguments.get("mountpoints")
            said: object = 2 if self.frozen_mounts is None else len(self.frozen_mounts)
        elif name == "guest-fsfreeze-thaw":
            said, self.is_frozen = int(self.is_frozen), False
            self.thawed.set()
        elif name == "guest-fsfreeze-status":
            said = "frozen" if self.is_frozen else "thawed"
        else:
            return json.dumps({"error": {"desc": f"no {name}"}}).encode() + b"\n"
        return json.dumps({"return": said}).encode() + b"\n"


@pytest.fixture
def guest():
    with tempfile.TemporaryDirectory(prefix="sb-") as folder:
        made = Guest(Path(folder) / "qga.sock")
        yield made
        made.close()


@pytest.fixture
def volume(guest, volume):
    settle(volume, agent=str(guest.path), freeze_limit_ms=1000)
    return volume


def settle(volume, **fields):
    set_consistency(volume._opened, ConsistencyRequest(**fields))


def take(volume, name="x", **fields):
    return volume.snapshot(name, consistency="filesystem", **fields).receipt


def test_a_guest_is_frozen_for_the_instant_and_thawed(volume, guest):
    settle(volume, freeze_limit_ms=30_000)
    receipt = take(volume)
    assert receipt.consistency == "filesystem"
    assert [str(s.kind) for s in receipt.quiescing.steps] == ["freeze", "thaw"]
    assert "2 filesystems" in receipt.quiescing.steps[0].detail
    assert not guest.is_frozen
    assert not volume._opened.frozen_note.exists()
    order = [n for n in guest.heard if n != "guest-sync-delimited"]
    assert order == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"]
    assert guest.heard[0] == "guest-sync-delimited"


def test_only_the_named_mounts_of_a_guest_are_frozen(volume, guest):
    settle(volume, agent_mounts=("/srv", "/var"), freeze_limit_ms=30_000)
    assert "(/srv, /var)" in take(volume).quiescing.steps[0].detail
    assert guest.frozen_mounts == ["/srv", "/var"]


def test_an_agent_that_never_answers_costs_the_limit_and_no_more(volume, guest):
    guest.mute = {"guest-sync-delimited"}
    begun = time.monotonic()
    with pytest.raises(QuiesceError, match=r"did not answer in time|timed out"):
        take(volume)
    assert time.monotonic() - begun < 10
    assert volume.snapshots() == ()
    # It was never asked to freeze, so nobody has to make sure that it thaws.
    assert wait_gone(running("agent.py"))


def end_of(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_gone(pids)


def test_a_freeze_whose_answer_does_not_come_is_thawed(volume, guest):
    guest.mute = {"guest-fsfreeze-freeze"}
    receipt = take(volume, or_barrier=True)
    assert receipt.consistency == "barrier"
    assert "was not frozen" in receipt.quiescing.shortfall
    assert guest.thawed.wait(WAIT_S), "it may have been frozen all the same"
    assert wait_gone(running("agent.py"))


def test_a_late_answer_is_not_taken_for_the_next_one(volume, guest):
    late = threading.Event()
    guest.delay_until = {"guest-fsfreeze-freeze": late}
    with pytest.raises(QuiesceError):
        take(volume)
    late.set()
    assert guest.thawed.wait(WAIT_S)
    assert wait_gone(running("agent.py"))
    assert not guest.is_frozen
    assert take(volume, "y").consistency == "filesystem"


def test_bytes_of_an_earlier_conversation_are_no_answers(tmp_path):
    """What was left half said, and answers to somebody else, come before ours."""
    path = tmp_path / "s"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b'{"return": 99}\n\xff{"return": 12345}\n{"ret')
            heard = b""
            while not heard.endswith(b"\n"):
                heard += connection.recv(4096)
            assert heard.startswith(b"\xff")
            number = json.loads(heard[1:])["arguments"]["id"]
            connection.sendall(b'urn": 7}\n\xff' + json.dumps({"return": number}).encode() + b"\n")
            connection.recv(4096)
            connection.sendall(b'{"return": 3}\n')

    thread = threading.Thread(target=serve)
    thread.start()
    deadline_s = time.monotonic() + WAIT_S
    talk = agent.Agent(str(path), deadline_s=deadline_s)
    talk.synchronize(deadline_s=deadline_s)
    assert agent.freeze(talk, [], deadline_s=deadline_s) == 3
    talk.close()
    thread.join(WAIT_S)
    listener.close()


@pytest.mark.parametrize(
    "said",
    [b"\xff" * 70_000 + b"[" * 100_000, b"\xff{}\n", b'\xff{"return": {"a": 1}}\n', b"\xffnull\n"],
)
def test_a_guest_that_talks_nonsense_is_only_a_guest_that_does_not_answer(tmp_path, said):
    path = tmp_path / "s"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                connection.sendall(said)
                while connection.recv(4096):
                    pass
            except OSError:
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    deadline_s = time.monotonic() + 1
    talk = agent.Agent(str(path), deadline_s=deadline_s)
    with pytest.raises((agent.AgentError, TimeoutError)):
        talk.synchronize(deadline_s=deadline_s)
    talk.close()
    thread.join(WAIT_S)
    listener.close()


def test_an_agent_that_freezes_nothing_is_no_level(volume, guest):
    settle(volume, agent_mounts=())
    guest._answer_as = guest._answer
    guest._answer = lambda name, arguments: (
        b'{"return": 0}\n' if name == "guest-fsfreeze-freeze" else guest._answer_as(name, arguments)
    )
    with pytest.raises(QuiesceError, match="froze no filesystem"):
        take(volume)


def test_a_killed_watchdog_of_a_guest_is_replaced_by_the_server(volume, guest):
    frozen = threading.Event()
    guest.delay_until = {"guest-fsfreeze-freeze": frozen}
    problems: list[Exception] = []

    def attempt() -> None:
        try:
            take(volume)
        except QuiesceError as error:
            problems.append(error)

    settle(volume, freeze_limit_ms=10_000)
    thread = threading.Thread(target=attempt)
    thread.start()
    assert wait_until(lambda: guest.is_frozen)
    assert volume._opened.frozen_note.exists()
    end_of(running("agent.py"))
    frozen.set()
    thread.join(WAIT_S)
    assert problems
    assert guest.thawed.wait(WAIT_S)
    assert not guest.is_frozen
    assert volume.snapshots() == ()


# The real agent -----------------------------------------------------------------------------------

ROOM = """
set -e
mount --bind "$1" "$2/mnt"
mount -t proc proc "$2/proc"
cd "$2"
pivot_root . old
exec ./sh /inside
"""
INSIDE = """
set -e
cd /
umount -l /old
# A plain freeze freezes whatever it finds: nothing may be found but the disk under test.
count=$(grep -c ' - [a-z0-9]* /dev/' /proc/self/mountinfo)
[ "$count" = 1 ] || { echo "$count disks are visible"; exit 1; }
grep -q ' /mnt .* - ext4 /dev/loop' /proc/self/mountinfo
exec qemu-ga -m unix-listen -p /run/qga.sock -t /run -f /run/qga.pid
"""


def copy_program(program: str, room: Path) -> None:
    """Copy a program with its libraries into a directory that becomes a root."""
    path = shutil.which(program)
    assert path is not None
    shutil.copy2(path, room / "bin" / Path(program).name)
    for line in run("ldd", path).out.splitlines():
        found = re.search(r"(/\S+) \(0x", line)
        if found:
            target = room / found[1].lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(found[1], target)


class RealAgent:
    """qemu-ga in a mount namespace that holds the mount under test and no other disk."""

    def __init__(self, point: Path, room: Path) -> None:
        for name in ("bin", "mnt", "proc", "old", "run", "dev"):
            (room / name).mkdir()
        for program in ("qemu-ga", "umount", "grep"):
            copy_program(program, room)
        copy_program("sh", room)
        shutil.copy2(room / "bin" / "sh", room / "sh")
        (room / "inside").write_text("PATH=/bin; export PATH\n" + INSIDE)
        self.socket = room / "run" / "qga.sock"
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ROOM, "sh"]
        self.process = subprocess.Popen(
            [*words, str(point), str(room)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert wait_until(lambda: self.socket.exists() or self.process.poll() is not None)
        if self.process.poll() is not None:
            said = self.process.communicate()[0].decode()
            pytest.skip(f"host: no private mount namespace for qemu-ga: {said}")

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=WAIT_S)


@pytest.mark.slow
@pytest.mark.needs("qemu-ga", "unshare", "nbdfuse", "losetup", "mkfs.ext4", "e2fsck", "ldd")
@pytest.mark.parametrize("named", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_real_agent_freezes_the_disk_and_the_snapshot_is_whole(named, tmp_path):
    require_mounts()
    room = tmp_path / "room"
    room.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(room))
    try:
        with formatted() as served:
            served.start()
            with mounted(served) as disk:
                real = RealAgent(disk.point, room)
                try:
                    (disk.point / "cached").write_bytes(b"c" * (1 << 20))
                    with served.session() as session:
                        session.set_consistency(
                            ConsistencyRequest(
                                agent=str(real.socket), agent_mounts=("/mnt",) if named else ()
                            )
                        )
                    words = ["web@x", "--consistency", "filesystem", "--json"]
                    receipt = served.cli("snapshot", "create", *words).json
                    assert receipt["consistency"] == "filesystem"
                    assert disk.can_write()
                finally:
                    real.close()
            image = tmp_path / "x.img"
            image.write_bytes(served.read("x"))
            # Frozen: nothing to replay, and what was only in memory is there.
            run("e2fsck", "-f", "-n", str(image))
            out = run("debugfs", "-R", "stat /cached", str(image)).out
            assert "Size: 1048576" in out
    finally:
        run("umount", "-l", str(room))
