"""CPU time of our compiled resizes beside the libraries whose bytes they give: torch's bilinear of clips, Pillow's bicubic of images.

Everything runs on one thread, turn by turn, on noise. Only the ratios mean something.

    python -m benchmarks.resize
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from PIL import Image

from megatron_keye.data.media import torch_resize
from megatron_keye.data.media.resample import resize_bicubic, resize_bilinear
from megatron_keye.data.media.resize import Size

Resize = Callable[[np.ndarray, Size], np.ndarray]

CASES: tuple[tuple[Size, Size], ...] = (
    ((360, 640), (364, 644)),
    ((480, 852), (448, 812)),
    ((480, 852), (252, 448)),
    ((720, 1280), (560, 1008)),
    ((720, 1280), (308, 532)),
    ((1080, 1920), (560, 1008)),
    ((1080, 1920), (252, 448)),
)
"""(height, width) before and after: slow and fast frames of clips of usual sizes."""


def pillow_bicubic(image: np.ndarray, size: Size) -> np.ndarray:
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


PAIRS: dict[str, tuple[Resize, Resize]] = {
    "bilinear, torch's bytes": (resize_bilinear, torch_resize.resize_bilinear),
    "bicubic, Pillow's bytes": (resize_bicubic, pillow_bicubic),
}
"""Ours and the library's."""


def compare(image: np.ndarray, size: Size, resizes: Sequence[Resize], turns: int) -> list[float]:
    """Median CPU milliseconds of each. Raises RuntimeError where their bytes differ."""
    first, *others = [resize(image, size) for resize in resizes]
    if any(not np.array_equal(first, other) for other in others):
        raise RuntimeError(f"resizes of {image.shape} to {size} differ")
    taken_ms: list[list[float]] = [[] for _ in resizes]
    for _ in range(turns):
        for resize, own_ms in zip(resizes, taken_ms, strict=True):
            began_s = time.process_time()
            resize(image, size)
            own_ms.append((time.process_time() - began_s) * 1e3)
    return [statistics.median(own_ms) for own_ms in taken_ms]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=101)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    for name, resizes in PAIRS.items():
        print(name)
        for (height, width), size in CASES:
            image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            ours_ms, library_ms = compare(image, size, resizes, arguments.turns)
            line = f"ours {ours_ms:5.2f} ms, the library {library_ms:5.2f} ms, ratio {library_ms / ours_ms:.2f}"
            print(f"  {height}x{width} to {size[0]}x{size[1]}: {line}")


if __name__ == "__main__":
    main()
