"""Freeze one filesystem and thaw it whatever happens: a program of its own, no part of the server.

    python -I -S guard.py CONTROL_FD MOUNT_FD LIMIT_MS

It imports next to nothing, belongs to no session and no parent, and ignores all signals but
SIGKILL. Three processes take part, and any one of them may be killed at any step:

    server -- control socket -- guard -- pipes -- freezer

The freezer makes the one call that can hang, FIFREEZE, and only after a sync that took the weight
off it; when the limit has passed by then it does not begin. The guard thaws when the server asks,
when the server is gone, when the limit has passed, and when the freezer is gone without a word. A
freeze that hangs cannot be called back: the guard tells the server so, and thaws when it returns.
If the guard is gone, or stopped, the freezer thaws; so does the server.

Messages are JSON, one a packet. To the server: `{"frozen": begun_ns}`, `{"failed": errno}`,
`{"late": true}`, `{"thawing": monotonic_ns, "why": word}` before the thaw, which may wait for the
disk, and `{"thawed": monotonic_ns, "why": word, "errno": 0}` after it. From it: anything, or an
end.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import sys
import time

FIFREEZE = 0xC0045877
"""`_IOWR('X', 119, int)` of linux/fs.h."""
FITHAW = 0xC0045878
"""`_IOWR('X', 120, int)`."""
NS_PER_MS = 1_000_000
_STEP_NS = 250 * NS_PER_MS
"""By so much a freezer whose guard does nothing waits longer than the guard should."""
_THAW_TRIES = 200
_THAW_PAUSE_S = 0.05
_MESSAGE_BYTES = 256
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)


def thaw(mount: int) -> int:
    """Let a filesystem go on; return 0 or the errno of the last try. EINVAL: it was not frozen."""
    code = 0
    for _ in range(_THAW_TRIES):
        try:
            fcntl.ioctl(mount, FITHAW, 0)
        except OSError as error:
            code = error.errno or errno.EIO
            if code in {errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTTY}:
                return code
            time.sleep(_THAW_PAUSE_S)
        else:
            return 0
    return code


def detach() -> None:
    """Become a process that nobody waits for and no signal to the server's group reaches."""
    if os.fork():
        os._exit(0)
    os.setsid()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


def send(control: int, **message: object) -> None:
    """Tell the server, if there still is one."""
    try:
        os.write(control, json.dumps(message).encode())
    except OSError:
        pass  # it is gone, which the end of the socket tells too


def _sync(mount: int) -> None:
    """Write out what the filesystem holds, before anybody has to wait for it."""
    import ctypes  # noqa: PLC0415 - only the freezer needs it

    library = ctypes.CDLL(None, use_errno=True)
    if library.syncfs(mount) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _freeze(mount: int, result: int, alive: int, deadline_ns: int) -> None:
    """Be the freezer: end only when the filesystem goes on again."""
    try:
        _sync(mount)
        is_alone = bool(select.select([alive], [], [], 0)[0])
        if is_alone or time.monotonic_ns() >= deadline_ns:
            raise OSError(errno.ETIMEDOUT, "too late to begin")
        begun_ns = time.monotonic_ns()
        fcntl.ioctl(mount, FIFREEZE, 0)
    except OSError as error:
        send(result, failed=error.errno or errno.EIO)
        return
    send(result, frozen=begun_ns)
    # A byte: the guard has thawed. The end, or silence beyond the limit: we have to.
    rest_ns = max(0, deadline_ns + _STEP_NS - time.monotonic_ns())
    if not select.select([alive], [], [], rest_ns / 1e9)[0] or not os.read(alive, 1):
        thaw(mount)


def main(control: int, mount: int, limit_ms: int) -> None:
    """Freeze, wait, thaw."""
    deadline_ns = time.monotonic_ns() + limit_ms * NS_PER_MS
    detach()
    result, result_in = os.pipe()
    alive, alive_in = os.pipe()
    if os.fork() == 0:
        for unused in (control, result, alive_in):
            os.close(unused)
        _freeze(mount, result_in, alive, deadline_ns)
        os._exit(0)
    os.close(result_in)
    os.close(alive)

    waiting = {control, result}
    why, is_told_late = "", False
    while not why or result in waiting:
        rest_ns = max(0, deadline_ns - time.monotonic_ns())
        # Once it is to be thawed there is nothing left to wait for but the freezer.
        ready = select.select(waiting, [], [], None if why else rest_ns / 1e9)[0]
        if result in ready:
            waiting.discard(result)
            said = os.read(result, _MESSAGE_BYTES)
            if b"failed" in said:
                os.write(control, said) if control in waiting else None
                return
            if said:
                send(control, **json.loads(said))
            else:
                why = why or "the freezing process was killed"
        if control in ready:
            waiting.discard(control)
            why = why or ("asked" if os.read(control, _MESSAGE_BYTES) else "the server was gone")
        if not why and time.monotonic_ns() >= deadline_ns:
            why = "the limit had passed"
        if why and result in waiting and not is_told_late:
            is_told_late = True
            send(control, late=True)
    begun_ns = time.monotonic_ns()
    send(control, thawing=begun_ns, why=why)
    code = thaw(mount)
    try:
        os.write(alive_in, b".")
    except OSError:
        pass  # the freezer is gone already
    send(control, thawed=begun_ns, why=why, errno=code)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:4]))
