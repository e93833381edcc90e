"""Which frames of a Keye-VL-1.5 video are slow and which are fast, as keye-vl-utils 1.5.2 finds it when a set is indexed.

The kernels are its own: torch's float32 reductions, OpenCV's HSV. Where that package fails (frames of one block row), the rule is stated
here.
"""

from collections.abc import Iterable

import cv2
import numpy as np
import torch

from megatron_keye.contract.media import TOKEN_PIXELS
from megatron_keye.data.media.resample import resize_bilinear
from megatron_keye.data.media.resize import TOKEN_AREA, smart_resize
from megatron_keye.data.media.rules import VideoRules

SLOW, FAST = 0, 1
_COMPARED_MIN_PIXELS = 48 * TOKEN_AREA
_COMPARED_MAX_PIXELS = 256 * TOKEN_AREA
_NORM_EPS = 1e-8
_BLACK_NORM = 0.01
"""A block whose norm is below this is black; HSV values are integers, so only an all-zero block is."""


class FrameTagger:
    """Tells slow from fast frames while they are decoded; it keeps the latest slow frame and nothing else."""

    def __init__(self, height: int, width: int, rules: VideoRules):
        """`height` and `width` are those of the frames to come, as decoded."""
        self._size = smart_resize(height, width, _COMPARED_MIN_PIXELS, _COMPARED_MAX_PIXELS)
        self._rules = rules
        self._slow: tuple[torch.Tensor, torch.Tensor] | None = None

    def tag(self, frame: np.ndarray) -> int:
        """SLOW (0) or FAST (1) for the next frame, uint8 [height, width, 3]. The first frame is slow."""
        blocks = _hsv_blocks(resize_bilinear(frame, self._size))
        if self._slow is not None and not _similarity(self._slow, blocks, self._rules.block_similarity) < self._rules.min_frame_similarity:
            return FAST
        self._slow = blocks
        return SLOW


def frame_tags(frames: Iterable[np.ndarray], rules: VideoRules) -> np.ndarray:
    """uint8 [n], 0 slow and 1 fast, for n frames uint8 [H, W, 3]: an array [n, H, W, 3], or any iterable, read once."""
    tags, tagger = [], None
    for frame in frames:
        tagger = tagger or FrameTagger(*frame.shape[:2], rules)
        tags.append(tagger.tag(frame))
    return np.array(tags, dtype=np.uint8)


def _hsv_blocks(frame: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors [rows, columns, 3 * 784] and norms [rows, columns] of the 28x28 blocks of an RGB frame, in HSV."""
    hsv = torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)).float()
    rows, columns = frame.shape[0] // TOKEN_PIXELS, frame.shape[1] // TOKEN_PIXELS
    blocks = hsv.reshape(rows, TOKEN_PIXELS, columns, TOKEN_PIXELS, 3).permute(0, 2, 4, 1, 3).reshape(rows, columns, -1)
    norms = blocks.norm(dim=-1, keepdim=True) + _NORM_EPS
    return blocks / norms, norms.squeeze(-1)


def _similarity(slow: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor], threshold: float) -> float:
    """Share of blocks with a cosine above `threshold`, without those black in both; NaN (not below any limit) if all are.

    In float32, as released: 9 of 10 blocks are 0.89999998, less than 0.9.
    """
    (slow_units, slow_norms), (units, norms) = slow, other
    cosine = (slow_units * units).sum(dim=-1)
    counted = ~((slow_norms < _BLACK_NORM) & (norms < _BLACK_NORM))
    return (cosine[counted] > threshold).float().mean().item()
