"""Whether the ffmpeg command would save clips that the decoder refuses: damaged clips, and what each makes of them.

A clip is saved where the command gives as many frames as the whole clip has, each of which looks like the right one. Needs ffmpeg:

    python -m benchmarks.last_resort --clips 60
"""

import argparse
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.io_server import FRAME_RATE, make_clip
from megatron_keye.data.media.video import decode_frames
from megatron_keye.errors import DataError

CODECS = ("h264", "hevc", "libvpx-vp9", "libsvtav1")
SECONDS, HEIGHT = 2, 144
NEAR_GREY_LEVELS = 48
"""By which a right frame may differ: versions of FFmpeg round colours in different ways."""


def damaged(blob: bytes, number: int, rng: np.random.Generator) -> bytes:
    """One of three kinds: flipped bits, the end missing, a hole of zeros."""
    data = np.frombuffer(blob, np.uint8).copy()
    if number % 3 == 0:
        places = rng.integers(len(data) // 10, len(data), 3)
        data[places] ^= np.uint8(1) << rng.integers(0, 8, 3).astype(np.uint8)
    elif number % 3 == 1:
        return blob[: int(len(blob) * rng.uniform(0.3, 0.98))]
    else:
        start = rng.integers(len(data) // 10, len(data) - 200)
        data[start : start + 100] = 0
    return data.tobytes()


def by_command(blob: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [n, H, W, 3]: all frames that ffmpeg gives; `shape` is that of one."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(blob)
        file.flush()
        command = ["ffmpeg", "-v", "quiet", "-i", file.name, "-f", "rawvideo", "-pix_fmt", "rgb24", "-vsync", "passthrough", "-"]
        output = subprocess.run(command, capture_output=True, check=False).stdout
    return np.frombuffer(output[: len(output) // np.prod(shape) * np.prod(shape)], np.uint8).reshape(-1, *shape)


def verdict(blob: bytes, whole: np.ndarray) -> str:
    """What becomes of a damaged clip whose frames were `whole`."""
    try:
        decode_frames(blob, range(len(whole)))
        return "decoded here"
    except DataError:
        found = by_command(blob, whole.shape[1:])
    if len(found) != len(whole):
        return "refused; the command gives another number of frames"
    farthest = np.abs(found.astype(np.int16) - whole).reshape(len(whole), -1).max()
    return "refused; saved by the command" if farthest <= NEAR_GREY_LEVELS else "refused; the command gives wrong pictures, and no error"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=60, help="damaged copies of each clip")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for codec in CODECS:
            path = Path(folder) / f"{codec}.mp4"
            make_clip(path, codec, SECONDS, HEIGHT, seed=0)
            blob = path.read_bytes()
            whole = decode_frames(blob, range(SECONDS * FRAME_RATE))
            found = Counter(verdict(damaged(blob, number, rng), whole) for number in range(args.clips))
            print(codec, dict(sorted(found.items())), flush=True)


if __name__ == "__main__":
    main()
