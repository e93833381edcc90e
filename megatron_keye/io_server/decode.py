"""The worker program that servers start: the local decoder's own functions, one thread, behind `worker.main`."""

import sys
from collections.abc import Iterator

import cv2
import numpy as np
import torch

from megatron_keye.data.items import Frames, Item, iter_patches
from megatron_keye.data.media.fingerprint import pixel_fingerprint
from megatron_keye.io_server.protocol import DecodeJob, decoder_id
from megatron_keye.io_server.worker import main


def decode(job: DecodeJob, blob: bytes) -> Iterator[np.ndarray]:
    """Yields uint8 [num_patches, 588] as `data.items.iter_patches` does. Raises DataError."""
    return iter_patches(_item(job), job.sizes, blob, job.variant)


def _item(job: DecodeJob) -> Item:
    """What pixels depend on; times and rates of frames decide about positions, which the client knows."""
    if job.frames is None:
        return Item(job.height, job.width)
    numbers = np.array(job.frames, dtype=np.int32)
    tags = np.array(job.fast or np.zeros(len(numbers)), dtype=np.uint8)
    frames = Frames(numbers, np.zeros(len(numbers), dtype=np.float32), tags, rate=1.0, clip_frames=0, clip_fps=0.0)
    return Item(job.height, job.width, frames=frames)


if __name__ == "__main__":
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    sys.exit(main(decode, decoder_id(pixel_fingerprint())))
