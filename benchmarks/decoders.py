"""Frames per CPU second of this project's video decoder beside other libraries, on clips with B-frames sampled at 2 frames per second.

decord and torchcodec are measured where they can be imported; both in their exact modes, each with one thread. Rounds are interleaved, and
only the ratios mean something:

    pip install decord && python -m benchmarks.decoders --codec h264
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.io_server import FRAME_RATE, make_clip
from megatron_keye.data.media.video import iter_frames

SAMPLED_PER_S = 2

Decode = Callable[[Path, list[int]], np.ndarray]
"""uint8 [n, H, W, 3] RGB frames of a file, by number."""


def ours(path: Path, numbers: list[int]) -> np.ndarray:
    return np.stack(list(iter_frames(path.read_bytes(), numbers)))


def by_decord(path: Path, numbers: list[int]) -> np.ndarray:
    import decord

    return decord.VideoReader(str(path), num_threads=1).get_batch(numbers).asnumpy()


def by_torchcodec(path: Path, numbers: list[int]) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="exact", dimension_order="NHWC")
    return decoder.get_frames_at(numbers).data.numpy()


def cpu_seconds(decode: Decode, path: Path, numbers: list[int]) -> float:
    began_s = time.process_time()
    found = len(decode(path, numbers))
    if found != len(numbers):
        raise RuntimeError(f"{decode.__name__} gave {found} of {len(numbers)} frames")
    return time.process_time() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--codec", default="h264", help="an encoder of PyAV: h264, hevc, ...")
    parser.add_argument("--seconds", type=int, default=16, help="length of the clip")
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    decoders: dict[str, Decode] = {"ours": ours}
    decoders |= {name: decode for name, decode in (("decord", by_decord), ("torchcodec", by_torchcodec)) if importlib.util.find_spec(name)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        make_clip(path, args.codec, args.seconds, args.height, seed=0)
        numbers = list(range(0, args.seconds * FRAME_RATE, FRAME_RATE // SAMPLED_PER_S))
        rounds = [{name: cpu_seconds(decode, path, numbers) for name, decode in decoders.items()} for _ in range(args.rounds + 1)][1:]
    for name in decoders:
        rate = len(numbers) / statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[name] / times["ours"] for times in rounds)
        print(f"{args.codec} {args.height}p  {name:10}  {rate:6.1f} frames per CPU second; ours makes {ratio:.2f} times as many")


if __name__ == "__main__":
    main()
