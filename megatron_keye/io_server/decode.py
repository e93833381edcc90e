"""The worker program that servers start: the run's own functions, with the decoder of its first argument, behind `worker.main`."""

import sys
from collections.abc import Iterator
from functools import partial

import cv2
import numpy as np
import torch

from megatron_keye.data.items import Frames, Item, iter_patches
from megatron_keye.data.media.decoder import MediaDecoder, decoder_id, open_decoder
from megatron_keye.errors import KeyeError
from megatron_keye.io_server.protocol import DecodeJob
from megatron_keye.io_server.worker import main


def decode(decoder: MediaDecoder, job: DecodeJob, blob: bytes) -> Iterator[np.ndarray]:
    """Yields uint8 [num_patches, 588] as `data.items.iter_patches` does. Raises DataError and UnsupportedError."""
    return iter_patches(_item(job), job.sizes, blob, job.variant, decoder)


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
    name, *arguments = sys.argv[1:]
    try:
        chosen = open_decoder(name)
    except KeyeError as missing:
        sys.exit(f"error: {missing}")
    sys.exit(main(arguments, partial(decode, chosen), decoder_id(chosen)))
