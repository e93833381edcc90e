"""A worker program whose decoder does what the file's content says, so that every way to fail can be asked for."""

import hashlib
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from megatron_keye.contract.media import PATCH_VALUES
from megatron_keye.errors import DataError
from megatron_keye.io_server.worker import main

FAKE_ID = "fake-1"


def decode(job, blob):
    """`WORD ARGUMENT`; any other content is the seed of pixels."""
    word, _, argument = blob.decode("latin-1").partition(" ")
    if word == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "crash_once" and not Path(argument).exists():
        Path(argument).touch()
        # Half an answer first: the next worker must begin anew.
        yield np.full((job.segments[0], PATCH_VALUES), 77, np.uint8)
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "hang":
        time.sleep(600)
    if word == "memory":
        np.ones(1 << 33, np.uint8)
    if word == "corrupt":
        raise DataError("found garbage; restore it")
    if word == "warn":
        warnings.warn("strange", stacklevel=1)
    if word in ("bug", "warn"):
        raise RuntimeError("nobody thought of this")
    if word == "short":
        return
    for patches in pixels(job, blob):
        if word == "sleep":
            time.sleep(float(argument.split()[0]))
        yield patches


def pixels(job, blob):
    seed = int.from_bytes(hashlib.sha256(blob).digest()[:4], "big")
    rng = np.random.default_rng(seed)
    for count in job.segments:
        yield rng.integers(0, 256, (count, PATCH_VALUES), dtype=np.uint8)


if __name__ == "__main__":
    if sys.argv[1] == "identify":
        print(FAKE_ID)
    else:
        sys.exit(main(sys.argv[3:], decode))
