"""A worker process: takes one job at a time from the front, writes its patches into the memory file that came with it.

It may be killed at any moment, by its own limits or by the front, and is never trusted to answer. Nothing here knows how to decode;
`decode` is handed in.
"""

import os
import select
import signal
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_keye.data import messages
from megatron_keye.data.limits import is_out_of_memory, limit_memory
from megatron_keye.errors import DataError, UnsupportedError
from megatron_keye.io_server.blobs import Blobs, DiskCache
from megatron_keye.io_server.events import log_event, logging_as_events
from megatron_keye.io_server.protocol import DecodeJob, Refused, parse_job

Decode = Callable[[DecodeJob, bytes], Iterator[np.ndarray]]
"""Patches of a job from its bytes, uint8 [n, 588] at a time, in order."""
MAX_MESSAGE = 4000
ALARM_GRACE_S = 5
"""A worker whose front is gone ends itself this long after a job's time limit."""


class Cancelled(Exception):
    """The front no longer wants the answer."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """`memory_bytes` is address space beyond what the worker takes when it starts, and what libraries take that it loads later
    (`limits.lifted_memory_limit`)."""

    memory_bytes: int
    decode_s: float


def serve(sock: socket.socket, blobs: Blobs, limits: WorkerLimits, decode: Decode) -> None:
    """Answer jobs until the front closes its end."""
    limit_memory(limits.memory_bytes)
    messages.send(sock, {"ready": True})
    while True:
        try:
            message, fd = messages.receive(sock)
        except messages.Closed:
            return
        if fd is None:  # a cancellation that came too late
            continue
        signal.alarm(int(limits.decode_s) + ALARM_GRACE_S)
        reply = _answer(sock, blobs, message, fd, decode)
        signal.alarm(0)
        messages.send(sock, reply)
        if reply.get("error") == "oom":  # what is left of the heap may be in pieces
            return


def _answer(sock: socket.socket, blobs: Blobs, message: dict[str, Any], fd: int, decode: Decode) -> dict[str, Any]:
    try:
        job = parse_job(message["job"].encode())
        blob = blobs.read(job)
        checksum, num_bytes = xxhash.xxh3_64(), 0
        with open(fd, "wb") as slab:
            slab.seek(0)  # the position is shared with whoever had the file before
            for patches in decode(job, blob.content):
                if select.select([sock], [], [], 0)[0]:
                    raise Cancelled
                slab.write(patches)
                checksum.update(patches)
                num_bytes += patches.nbytes
        if num_bytes != job.result_bytes:
            raise DataError(f"found {num_bytes} bytes of pixels: expected {job.result_bytes}")
    except Cancelled:
        return {"error": "worker_lost", "message": "cancelled"}
    except Refused as error:
        return {"error": error.code, "message": str(error)}
    except Exception as error:
        code = _code(error)
        if code == "internal":
            log_event("internal error", traceback=traceback.format_exc())
        return {"error": code, "message": f"{type(error).__name__}: {error}"[:MAX_MESSAGE]}
    return {"xxh3_64": checksum.hexdigest(), "from_disk": blob.from_disk}


def _code(error: BaseException) -> str:
    if is_out_of_memory(error):
        return "oom"
    if isinstance(error, UnsupportedError):
        return "unsupported"
    return "corrupt" if isinstance(error, DataError) else "internal"


def main(arguments: Sequence[str], decode: Decode) -> int:
    """Serve with `decode`.

    `arguments`: descriptor of the socket, memory limit in bytes, time limit in seconds, folder of the disk cache or nothing, its limit
    in bytes, roots.
    """
    fd, memory_bytes, decode_s, disk_folder, disk_bytes, *roots = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the front, which ends its workers
    with logging_as_events(), socket.socket(fileno=int(fd)) as sock:
        os.set_inheritable(sock.fileno(), False)
        disk = DiskCache(Path(disk_folder), int(disk_bytes)) if disk_folder else None
        serve(sock, Blobs(roots, disk), WorkerLimits(int(memory_bytes), float(decode_s)), decode)
    return 0
