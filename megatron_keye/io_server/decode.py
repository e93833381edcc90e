"""The program that servers start, with the decoder of its first argument.

`identify` prints the decoder's id, which takes torch and a second. `serve` decodes by the run's own functions, behind `worker.main`;
torch is loaded for Preview's clips alone, and for those of Keye-VL-1.5 where numba is missing.
"""

import sys
import traceback
from collections.abc import Iterator
from functools import partial

import cv2
import numpy as np

from megatron_keye.data.items import Frames, Item, iter_patches
from megatron_keye.data.media.decoder import MediaDecoder, check_versions, decoder_id, open_decoder
from megatron_keye.data.media.resample import load_compiled
from megatron_keye.errors import KeyeError
from megatron_keye.io_server import worker
from megatron_keye.io_server.events import log_event
from megatron_keye.io_server.protocol import DecodeJob


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


def main(name: str, action: str, *arguments: str) -> int:
    """`identify`, or `serve` with the id that it printed and the arguments of `worker.main`. Raises SettingsError for a decoder that is
    missing, and one that is not that of the id any more."""
    if action == "identify":
        return _identify(name)
    decoder = open_decoder(name)
    found_id, *rest = arguments
    check_versions(decoder, found_id)
    cv2.setNumThreads(1)
    load_compiled()
    return worker.main(rest, partial(decode, decoder))


def _identify(name: str) -> int:
    """Print the decoder's id, or why there is none, for the server to say; the exit code tells which."""
    try:
        print(decoder_id(open_decoder(name)))
    except KeyeError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyeError as error:
        log_event("error", message=str(error))
        sys.exit(error.exit_code)
    except Exception:
        log_event("internal error", traceback=traceback.format_exc())
        sys.exit(1)
