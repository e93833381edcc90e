"""The loop of a worker process: it opens the data sets of a run and answers one request at a time, into the memory file that comes
with it. `workers.py` starts it, and replaces it when it dies, hangs or runs out of memory.

Nothing here knows how to decode; what opens the data sets is handed in.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

from megatron_keye.contract.media import PATCH_VALUES
from megatron_keye.data import messages
from megatron_keye.data.limits import end_with_parent, is_out_of_memory, limit_memory
from megatron_keye.data.sources import Samples
from megatron_keye.errors import DataError, KeyeError, MediumUnreachableError, UnreachableError, UnsupportedError


class CountedSamples(Samples, Protocol):
    fingerprint: str

    def bytes_read(self) -> int: ...


OpenSets = Callable[[list[dict[str, Any]]], Sequence[CountedSamples]]
"""Opens the data sets of the first message."""


TOKEN_BYTES = 5
"""An int32 id and a bool."""


def result_bytes(num_tokens: int, num_patches: int) -> int:
    """What a sample takes in the memory file."""
    return num_tokens * TOKEN_BYTES + num_patches * PATCH_VALUES


def serve(sock: socket.socket, opener: OpenSets) -> None:
    """Open what the first message names, then answer until the other side closes. A request is {"set", "samples"}, of each
    sample (number, tokens, patches), with a memory file for all of them one after another; the answer {"bytes_read", "failed"}, of each
    sample that could not be read (place in the request, code, message), or {"error": "oom", "message"}."""
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
    before_bytes, failed, start = samples.bytes_read(), [], 0
    with open(fd, "wb") as slab:
        for place, (sample, num_tokens, num_patches) in enumerate(job["samples"]):
            try:
                slab.seek(start)  # the position is shared with whoever had the file before
                _write(samples, sample, (num_tokens, num_patches), slab)
            except Exception as error:
                code = _code(error)
                if code == "oom":
                    return {"error": code, "message": str(error)}
                failed.append([place, code, "".join(traceback.format_exception(error)) if code == "internal" else str(error)])
            start += result_bytes(num_tokens, num_patches)
    return {"bytes_read": samples.bytes_read() - before_bytes, "failed": failed}


def _write(samples: Samples, sample: int, planned: tuple[int, int], slab: BinaryIO) -> None:
    """int32 token ids, bool supervision, uint8 patches, without gaps."""
    tokens, patches = samples.tokens(sample), samples.pixels(sample)
    found = (len(tokens.token_ids), sum(len(p) for p in patches))
    if found != planned:
        raise AssertionError(f"found {found} tokens and patches, but {planned} were planned")
    slab.write(np.ascontiguousarray(tokens.token_ids, dtype=np.int32))
    slab.write(np.ascontiguousarray(tokens.supervised, dtype=bool))
    for segment in patches:
        slab.write(np.ascontiguousarray(segment))


def _code(error: Exception) -> str:
    if is_out_of_memory(error):
        return "oom"
    codes = {
        MediumUnreachableError: "medium_unreachable",  # a DataError, too
        DataError: "data",
        UnreachableError: "unreachable",
        UnsupportedError: "unsupported",
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), "internal")


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
