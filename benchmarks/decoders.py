"""Frames per CPU second of this project's video decoder beside other libraries, on clips with B-frames.

decord and torchcodec are measured where they can be imported; both in their exact modes, each with one thread. Rounds are interleaved, and
only the ratios mean something. torchcodec needs FFmpeg's shared libraries, and a version that was built for torch without CUDA:

    apt-get install ffmpeg && pip install decord torchcodec==0.13.0
    python -m benchmarks.decoders --codec hevc --clip mixed --every 30
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from benchmarks.io_server import FRAME_RATE, WEB_BITS_PER_PIXEL, make_clip
from megatron_keye.data.media.video import iter_frames

MIXED_SOURCES = ("mandelbrot=", "testsrc2=", "gradients=", "life=mold=10:")
NOISE = "noise=alls=8:allf=t"
GROUP_FRAMES = 250

Decode = Callable[[Path, list[int]], Sequence[np.ndarray]]
"""uint8 [n, H, W, 3] RGB frames of a file, by number."""


def make_mixed_clip(path: Path, codec: str, seconds: int, height: int, group_frames: int) -> None:
    """A clip with B-frames, scene cuts and noise, drawn by FFmpeg; `group_frames` is the most from one key frame to the next."""
    size = f"{height * 16 // 9 // 2 * 2}x{height}"
    scene_s = seconds / len(MIXED_SOURCES)
    scenes = [
        f"{source}s={size}:r={FRAME_RATE},trim=duration={scene_s},setpts=PTS-STARTPTS,format=yuv420p[v{number}]"
        for number, source in enumerate(MIXED_SOURCES)
    ]
    graph = ";".join([*scenes, "".join(f"[v{n}]" for n in range(len(scenes))) + f"concat=n={len(scenes)},{NOISE}"])
    with av.open(graph, format="lavfi") as source, av.open(str(path), "w") as target:
        track = target.add_stream(codec, rate=FRAME_RATE, options={"preset": "fast", "g": str(group_frames)})
        track.width, track.height = map(int, size.split("x"))
        track.pix_fmt, track.bit_rate = "yuv420p", int(WEB_BITS_PER_PIXEL * FRAME_RATE * track.width * track.height)
        for number, frame in enumerate(source.decode(video=0)):
            frame.pts, frame.time_base = number, Fraction(1, FRAME_RATE)
            target.mux(track.encode(frame))
        target.mux(track.encode(None))


def ours(path: Path, numbers: list[int]) -> list[np.ndarray]:
    return list(iter_frames(path.read_bytes(), numbers))


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
    parser.add_argument("--clip", choices=("pan", "mixed"), default="pan", help="one moving picture with grain, or scenes with noise")
    parser.add_argument("--every", type=int, default=15, help="frames from one that is wanted to the next, at 30 a second")
    parser.add_argument("--group-frames", type=int, default=GROUP_FRAMES, help="most from one key frame to the next, of --clip mixed")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    decoders: dict[str, Decode] = {"ours": ours}
    decoders |= {name: decode for name, decode in (("decord", by_decord), ("torchcodec", by_torchcodec)) if importlib.util.find_spec(name)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        if args.clip == "pan":
            make_clip(path, args.codec, args.seconds, args.height, seed=0)
        else:
            make_mixed_clip(path, args.codec, args.seconds, args.height, args.group_frames)
        numbers = list(range(0, args.seconds * FRAME_RATE, args.every))
        rounds = [{name: cpu_seconds(decode, path, numbers) for name, decode in decoders.items()} for _ in range(args.rounds + 1)][1:]
    for name in decoders:
        rate = len(numbers) / statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[name] / times["ours"] for times in rounds)
        print(
            f"{args.codec} {args.height}p {args.clip}  {name:10}  {rate:6.1f} frames per CPU second; ours makes {ratio:.2f} times as many"
        )


if __name__ == "__main__":
    main()
