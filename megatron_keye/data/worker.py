"""The loop of a worker process: it opens the data sets of a run and answers one sample at a time, into the memory file that comes
with the request. `workers.py` starts it, and replaces it when it dies, hangs or runs out of memory.

Nothing here needs torch; what opens the data sets, and does, is handed in.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

from megatron_keye.data import messages
from megatron_keye.data.limits import end_with_parent, is_out_of_memory, limit_memory
from megatron_keye.data.sources import Samples
from megatron_keye.errors import DataError, KeyeError, UnreachableError


class CountedSamples(Samples, Protocol):
    fingerprint: str

    def bytes_read(self) -> int: ...


OpenSets = Callable[[list[dict[str, Any]]], Sequence[CountedSamples]]
"""Opens the data sets of the first message."""


def serve(sock: socket.socket, opener: OpenSets) -> None:
    """Open what the first message names, then answer until the other side closes. A request is {"set", "sample", "num_tokens",
    "num_patches"} with a memory file; the answer {"bytes_read"}, or {"error", "message"}."""
    setup, _ = messages.receive(sock)
    try:
        sets = opener(setup["sets"])
    except KeyeError as error:
        messages.send(sock, {"error": "setup", "message": str(error)})
        return
    limit_memory(setup["memory_bytes"])
    messages.send(sock, {"fingerprints": [samples.fingerprint for samples in sets]})
    while True:
        job, fd = messages.receive(sock)
        reply = _answer(sets[job["set"]], job, fd)
        messages.send(sock, reply)
        if reply.get("error") == "oom":  # what is left of the heap may be in pieces
            return


def _answer(samples: CountedSamples, job: dict[str, Any], fd: int) -> dict[str, Any]:
    before_bytes = samples.bytes_read()
    try:
        with open(fd, "wb") as slab:
            slab.seek(0)  # the position is shared with whoever had the file before
            _write(samples, job, slab)
    except Exception as error:
        code = _code(error)
        text = "".join(traceback.format_exception(error)) if code == "internal" else str(error)
        return {"error": code, "message": text}
    return {"bytes_read": samples.bytes_read() - before_bytes}


def _write(samples: Samples, job: dict[str, Any], slab: BinaryIO) -> None:
    """int32 token ids, bool supervision, uint8 patches, without gaps."""
    tokens, patches = samples.tokens(job["sample"]), samples.pixels(job["sample"])
    found = (len(tokens.token_ids), sum(len(p) for p in patches))
    if found != (job["num_tokens"], job["num_patches"]):
        raise AssertionError(f"found {found} tokens and patches, but {job['num_tokens'], job['num_patches']} were planned")
    slab.write(np.ascontiguousarray(tokens.token_ids, dtype=np.int32))
    slab.write(np.ascontiguousarray(tokens.supervised, dtype=bool))
    for segment in patches:
        slab.write(np.ascontiguousarray(segment))


def _code(error: Exception) -> str:
    if is_out_of_memory(error):
        return "oom"
    if isinstance(error, DataError):
        return "data"
    return "unreachable" if isinstance(error, UnreachableError) else "internal"


def main(opener: OpenSets) -> int:
    """`argv`: descriptor of the socket, id of the parent process."""
    fd, parent_pid = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole job; the parent ends its workers when it has finished
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(int(parent_pid))
    with socket.socket(fileno=int(fd)) as sock:
        os.set_inheritable(sock.fileno(), False)
        try:
            serve(sock, opener)
        except messages.Closed:
            return 0
    return 1
