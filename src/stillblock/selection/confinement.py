"""Takes every right from this process but to compute and to talk over what it has open.

Linux offers several ways, each with gaps of its own; all are used. What cannot be had on this
kernel is left out (`can_filter_calls` tells, and `stillblock doctor` with it), but for the limits
on memory, time and descriptors, which every kernel has.
"""

import ctypes
import os
import platform
import resource
import struct
from dataclasses import dataclass
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_EFAULT: Final = 14
_SECCOMP_MODE_FILTER: Final = 2
_SIGKILL: Final = 9
_NOBODY: Final = 65534


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a worker may use."""

    memory_bytes: int = 512 << 20
    """Of address space; the interpreter takes some 50 MiB of it."""
    cpu_s: int = 600
    wall_s: float = 900.0
    """For one request, watched by the parent."""


# Numbers of the calls that a running interpreter needs: read write close fstat lseek mmap mprotect
# munmap brk rt_sigaction rt_sigprocmask rt_sigreturn mremap madvise getpid exit sigaltstack gettid
# futex clock_gettime exit_group getrandom restart_syscall sched_yield.
# From the kernel's tables: arch/x86/entry/syscalls/syscall_64.tbl and asm-generic/unistd.h.
_ALLOWED: Final = {
    "x86_64": (
        0xC000003E,
        "0 1 3 5 8 9 10 11 12 13 14 15 25 28 39 60 131 186 202 228 231 318 219 24",
    ),
    "aarch64": (
        0xC00000B7,
        "63 64 57 80 62 222 226 215 214 134 135 139 216 233 172 93 132 178 98 113 94 278 128 124",
    ),
}


def confine(limits: Limits) -> None:
    """Drop all rights for good. Everything to be imported is imported, everything open is open."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.geteuid() == 0:
        _become_nobody()
    # Behind the change of user, which clears it: nobody is left to read for.
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    # No new descriptor has a number below 0: nothing can be opened, what is open stays.
    _limit(resource.RLIMIT_NOFILE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NPROC, 0)
    # The first limit names itself by its signal; the second cannot be told from other kills.
    _limit(resource.RLIMIT_CPU, limits.cpu_s, hard_value=limits.cpu_s + 5)
    _limit(resource.RLIMIT_AS, limits.memory_bytes)
    _filter_calls(libc)


def can_filter_calls() -> bool:
    """Return whether this kernel refuses system calls by a filter, and we have a list for it."""
    libc = ctypes.CDLL(None, use_errno=True)
    # A kernel that filters finds no program behind a null pointer; another knows no such mode.
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)
    return ctypes.get_errno() == _EFAULT and platform.machine() in _ALLOWED


def _become_nobody() -> None:
    try:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    except OSError:
        pass  # a container without such a user: the filter below holds for root too


def _limit(what: int, value: int, *, hard_value: int | None = None) -> None:
    _, hard = resource.getrlimit(what)
    wanted = value if hard_value is None else hard_value
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(what, (min(value, allowed), allowed))


def _filter_calls(libc: ctypes.CDLL) -> None:
    """Let every system call fail with EPERM that is not on the list."""
    known = _ALLOWED.get(platform.machine())
    if known is None:
        return
    architecture, numbers = known
    allowed = [int(number) for number in numbers.split()]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    deny, allow = 0x00050000 | 1, 0x7FFF0000  # SECCOMP_RET_ERRNO with EPERM, SECCOMP_RET_ALLOW
    program = [
        (load, 0, 0, 4),  # seccomp_data.arch: the numbers are of one architecture
        (equal, 1, 0, architecture),
        (give, 0, 0, deny),
        (load, 0, 0, 0),  # seccomp_data.nr
    ]
    program += [(equal, len(allowed) - index, 0, number) for index, number in enumerate(allowed)]
    program += [(give, 0, 0, deny), (give, 0, 0, allow)]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    pointer = Program(len(program), ctypes.addressof(buffer))
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(pointer), 0, 0)
