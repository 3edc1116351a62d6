"""What a busy system does to a filesystem: files are made, changed, shared, moved, removed."""

import fcntl
import os
import random
from pathlib import Path

from unit.selection.filesystems.trees import sync

_CLONE = 0x40049409
"""ioctl FICLONE."""


class Churn:
    """A mounted tree that keeps changing; the same seed does the same."""

    def __init__(self, top: Path, *, seed: int, can_clone: bool = True) -> None:
        self._dice = random.Random(seed)
        self._folders = [top]
        self._files: list[Path] = []
        self._made = 0
        self._steps = [
            self._make,
            self._make,
            self._make,
            self._make_folder,
            self._remove,
            self._truncate,
            self._link,
            self._symlink,
            self._rename,
            self._allocate,
            self._puncture,
            self._sync,
        ]
        if can_clone:
            self._steps.append(self._clone)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            step = self._dice.choice(self._steps)
            if self._files or step == self._make:
                step()

    def _new(self, kind: str) -> Path:
        self._made += 1
        name = f"{kind}{self._made}" + "x" * self._dice.randrange(60)
        return self._dice.choice(self._folders) / name

    def _any(self) -> Path:
        return self._dice.choice(self._files)

    def _make(self) -> None:
        path = self._new("file")
        with path.open("wb") as file:
            for _ in range(self._dice.randrange(1, 4)):
                if self._dice.random() < 0.3:
                    file.seek(self._dice.randrange(1 << 20) & ~4095)
                file.write(self._dice.randbytes(self._dice.randrange(1, 60_000)))
            if self._dice.random() < 0.4:
                file.flush()
                os.fsync(file.fileno())
        self._files.append(path)

    def _make_folder(self) -> None:
        path = self._new("folder")
        path.mkdir()
        self._folders.append(path)

    def _remove(self) -> None:
        self._files.pop(self._dice.randrange(len(self._files))).unlink()

    def _truncate(self) -> None:
        os.truncate(self._any(), self._dice.randrange(200_000))

    def _link(self) -> None:
        path = self._new("link")
        os.link(self._any(), path)
        self._files.append(path)

    def _symlink(self) -> None:
        self._new("symlink").symlink_to("x" * self._dice.randrange(1, 900))

    def _rename(self) -> None:
        at = self._dice.randrange(len(self._files))
        path = self._new("moved")
        self._files[at].rename(path)
        self._files[at] = path

    def _allocate(self) -> None:
        with self._any().open("r+b") as file:
            os.posix_fallocate(
                file.fileno(), self._dice.randrange(1 << 18), self._dice.randrange(1, 1 << 18)
            )

    def _puncture(self) -> None:
        """Write every other block, so that the file's map grows."""
        with self._any().open("r+b") as file:
            for i in range(40):
                file.seek(8192 * i)
                file.write(b"z" * 4096)
            if self._dice.random() < 0.5:
                file.flush()
                os.fsync(file.fileno())

    def _sync(self) -> None:
        sync(self._any())

    def _clone(self) -> None:
        path = self._new("clone")
        with path.open("wb") as target, self._any().open("rb") as source:
            fcntl.ioctl(target.fileno(), _CLONE, source.fileno())
        self._files.append(path)
