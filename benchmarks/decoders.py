"""Frames per CPU second of this project's video decoder beside other libraries, on clips with B-frames or the like.

decord and torchcodec are measured where they can be imported; both in their exact modes, each with one thread, in the environment of a
decode worker. Rounds are interleaved, and only the ratios mean something. Frames are measured as decoded, and as the model takes them:
resized by torch's kernel, as the released processor does, or by ours, which gives the same bytes. torchcodec needs FFmpeg's shared
libraries, and a version that was built for torch without CUDA:

    apt-get install ffmpeg && pip install decord torchcodec==0.13.0
    python -m benchmarks.decoders --codec hevc --clip mixed --every 30
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from benchmarks.io_server import FRAME_RATE, GROUP_FRAMES, WEB_BITS_PER_PIXEL, encoder_options, make_clip, use_one_thread
from megatron_keye.config.schema import VideoConfig
from megatron_keye.data.limits import WORKER_ENVIRONMENT
from megatron_keye.data.media import torch_resize
from megatron_keye.data.media.resample import resize_bilinear
from megatron_keye.data.media.resize import Size
from megatron_keye.data.media.rules import video_rules
from megatron_keye.data.media.slow_fast import video_sizes
from megatron_keye.data.media.video import iter_frames

MIXED_SOURCES = ("mandelbrot=", "testsrc2=", "gradients=", "life=mold=10:")
NOISE = "noise=alls=8:allf=t"

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
        track = target.add_stream(codec, rate=FRAME_RATE, options=encoder_options(codec) | {"g": str(group_frames)})
        track.width, track.height = map(int, size.split("x"))
        track.pix_fmt, track.bit_rate = "yuv420p", int(WEB_BITS_PER_PIXEL * FRAME_RATE * track.width * track.height)
        for number, frame in enumerate(source.decode(video=0)):
            frame.pts, frame.time_base = number, Fraction(1, FRAME_RATE)
            target.mux(track.encode(frame))
        target.mux(track.encode(None))


def ours(path: Path, numbers: list[int]) -> list[np.ndarray]:
    return list(iter_frames(path.read_bytes(), numbers))


def by_pyav(path: Path, numbers: list[int]) -> list[np.ndarray]:
    """Every frame decoded, as the library does by itself: what leaving out frames can gain at most is in the ratio to this."""
    wanted = frozenset(numbers)
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = zip(range(numbers[-1] + 1), container.decode(video=0), strict=False)
        return [frame.to_ndarray(format="rgb24") for number, frame in frames if number in wanted]


def by_decord(path: Path, numbers: list[int]) -> np.ndarray:
    import decord

    return decord.VideoReader(str(path), num_threads=1).get_batch(numbers).asnumpy()


def by_torchcodec(path: Path, numbers: list[int]) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="exact", dimension_order="NHWC")
    return decoder.get_frames_at(numbers).data.numpy()


DECODERS: dict[str, tuple[Decode, Callable[[np.ndarray, Size], np.ndarray]]] = {
    "ours": (ours, resize_bilinear),
    "pyav": (by_pyav, torch_resize.resize_bilinear),
    "decord": (by_decord, torch_resize.resize_bilinear),
    "torchcodec": (by_torchcodec, torch_resize.resize_bilinear),
}


MODULES = {"ours": "av", "pyav": "av"}
"""Where it is not the decoder's name."""


def measure(name: str, path: Path, numbers: list[int], size: Size) -> tuple[float, float]:
    """CPU seconds of decoding, and of decoding and resizing."""
    decode, resize = DECODERS[name]
    began_s = time.process_time()
    frames = decode(path, numbers)
    decoded_s = time.process_time() - began_s
    if len(frames) != len(numbers):
        raise RuntimeError(f"{name} gave {len(frames)} of {len(numbers)} frames")
    for frame in frames:
        resize(frame, size)
    return decoded_s, time.process_time() - began_s


def can_decode(name: str, path: Path) -> bool:
    try:
        return len(DECODERS[name][0](path, [0])) == 1
    except Exception as error:  # decord 0.6.0 knows no AV1; it and torchcodec have errors of their own
        print(f"{name}: {str(error).strip().splitlines()[0]}", flush=True)
        return False


def measure_rounds(path: Path, numbers: list[int], size: Size, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """`measure` of every decoder that is installed, in turn; the first round, which loads libraries, does not count."""
    use_one_thread()
    names = [name for name in DECODERS if importlib.util.find_spec(MODULES.get(name, name)) and can_decode(name, path)]
    taken = [{name: measure(name, path, numbers, size) for name in names} for _ in range(rounds + 1)][1:]
    return {name: [times[name] for times in taken] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--codec", default="h264", help="an encoder of PyAV: h264, hevc, libvpx-vp9, libsvtav1")
    parser.add_argument("--seconds", type=int, default=16, help="length of the clip")
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--clip", choices=("pan", "mixed"), default="pan", help="one moving picture with grain, or scenes with noise")
    parser.add_argument("--every", type=int, default=15, help="frames from one that is wanted to the next, at 30 a second")
    parser.add_argument("--group-frames", type=int, default=GROUP_FRAMES, help="most from one key frame to the next")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    os.environ.update(WORKER_ENVIRONMENT)  # of the process that decodes
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        path = Path(folder) / "clip.mp4"
        if args.clip == "pan":
            make_clip(path, args.codec, args.seconds, args.height, seed=0, group_frames=args.group_frames)
        else:
            make_mixed_clip(path, args.codec, args.seconds, args.height, args.group_frames)
        numbers = list(range(0, args.seconds * FRAME_RATE, args.every))
        shape = next(iter_frames(path.read_bytes(), [0])).shape[:2]
        size = video_sizes(np.zeros(len(numbers), np.uint8), *shape, video_rules(VideoConfig(), "keye_vl_1_5")).slow
        found = process.submit(measure_rounds, path, numbers, size, args.rounds).result()
    print(f"{args.codec} {args.height}p {args.clip}, one frame of {args.every}, resized to {size[0]}x{size[1]}; frames per CPU second")
    for name, times in found.items():
        line = f"{name:10}"
        for at, what in enumerate(("decoded", "decoded and resized")):
            rate = len(numbers) / statistics.median(own[at] for own in times)
            ratio = statistics.median(own[at] / us[at] for own, us in zip(times, found["ours"], strict=True))
            line += f"   {what} {rate:6.1f} (ours {ratio:.2f} times as many)"
        print(line)


if __name__ == "__main__":
    main()
