"""What bounds a worker process: its memory, and its life, which ends with that of its parent."""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
"""One worker per core is given, and arenas of threads would count as memory in use. glibc keeps the memory of a frame for the next one:
to give it back and have the kernel clear new pages for each costs 7 % of the decoding of 480p clips."""

_PR_SET_PDEATHSIG = 1


def limit_memory(memory_bytes: int) -> None:
    """Let this process take `memory_bytes` of address space beyond what it has; what it then asks for in vain is a MemoryError."""
    _limit_address_space(_address_space_bytes() + memory_bytes)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def lifted_memory_limit() -> Iterator[None]:
    """For loading a library: what this process grows by meanwhile does not count against its limit, where it has one. The limit is that of
    the whole process, so other threads are free of it as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == hard:
        yield
        return
    before_bytes = _address_space_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    try:
        yield
    finally:
        _limit_address_space(soft + _address_space_bytes() - before_bytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out anywhere below `error`, which libraries report as errors of their own."""
    cause: BaseException | None = error
    while cause is not None:
        # torch's allocator raises a RuntimeError that only its text tells apart.
        if isinstance(cause, MemoryError) or "DefaultCPUAllocator" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process, even a stopped one, when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the kernel was asked
        sys.exit(1)


def _limit_address_space(num_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard), hard))


def _address_space_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
