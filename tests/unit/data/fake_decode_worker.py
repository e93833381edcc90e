"""A worker program whose samples do what the settings of the test say, so that every way to fail can be asked for.

The location of its one data set is a folder with `behaviour.json`: {sample: [word, ...]}, one word per try, then "good".
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from megatron_keye.contract.media import PATCH_VALUES, PatchGrid, SampleShape, Segment
from megatron_keye.data.tokenize import TokenizedSample
from megatron_keye.data.worker import main
from megatron_keye.errors import DataError, UnreachableError

BYTES_PER_SAMPLE = 1000


def fake_shape(sample):
    segments = tuple(Segment(PatchGrid(1, 2, 2 + 2 * n), 1) for n in range(sample % 3))
    return SampleShape(3 + sample % 5 + sum(s.grid.num_tokens for s in segments), segments)


def fake_tokens(sample):
    shape = fake_shape(sample)
    ids = np.arange(shape.num_tokens, dtype=np.int32) + 1000 * sample
    return TokenizedSample(ids, ids % 2 == 0, shape)


def fake_pixels(sample):
    return [np.full((s.grid.num_patches, PATCH_VALUES), sample + n, np.uint8) for n, s in enumerate(fake_shape(sample).segments)]


class FakeSamples:
    fingerprint = "fake"

    def __init__(self, folder):
        self._folder, self._num_read = Path(folder), 0
        self._behaviour = json.loads((self._folder / "behaviour.json").read_text())

    def tokens(self, sample):
        self._num_read += 1
        self._behave(sample)
        return fake_tokens(sample)

    def pixels(self, sample):
        return fake_pixels(sample)

    def sample_id(self, sample):
        return f"id{sample}"

    def bytes_read(self):
        return self._num_read * BYTES_PER_SAMPLE

    def _behave(self, sample):
        words = self._behaviour.get(str(sample), [])
        tries = self._folder / f"tries{sample}"
        done = len(tries.read_text()) if tries.exists() else 0
        tries.write_text("x" * (done + 1))
        if done < len(words):
            DEEDS[words[done]]()


def fail(error):
    raise error


DEEDS = {
    "good": lambda: None,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(600),
    "bloat": lambda: bytearray(1 << 30),
    "exit": lambda: os._exit(3),
    "slow": lambda: time.sleep(0.3),
    "data": lambda: fail(DataError("the picture is cut off")),
    "unreachable": lambda: fail(UnreachableError("the store does not answer")),
    "bug": lambda: fail(ZeroDivisionError("a bug")),
}


def open_fakes(sets):
    return [FakeSamples(described["location"]) for described in sets]


if __name__ == "__main__":
    sys.exit(main(open_fakes))
