"""Slow-fast video of Keye-VL-1.5: which frames, which of them are slow, and how large both kinds are.

Every number equals that of keye-vl-utils 1.5.2 for the preset `released`, so the kernels are its own: torch's antialiased
bilinear resize on uint8 and its float32 reductions, OpenCV's HSV. Where that package fails (a clip that yields no frame,
frames of one block row), the rule is stated here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from megatron_keye.contract.media import TOKEN_PIXELS
from megatron_keye.data.media.resize import TOKEN_AREA, Size, smart_resize
from megatron_keye.data.media.rules import VideoRules
from megatron_keye.data.media.sampling import check_clip, uniform_indices

SLOW, FAST = 0, 1
_COMPARED_MIN_PIXELS = 48 * TOKEN_AREA
_COMPARED_MAX_PIXELS = 256 * TOKEN_AREA
_NORM_EPS = 1e-8
_BLACK_NORM = 0.01
"""A block whose norm is below this is black; HSV values are integers, so only an all-zero block is."""


@dataclass(frozen=True, slots=True)
class VideoSizes:
    """(height, width) in pixels of the slow and of the fast frames of one video."""

    slow: Size
    fast: Size


def sample_indices(
    total_frames: int, video_fps: float, rules: VideoRules, min_pixels: int | None = None, total_tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Frames to take, int64 [n], and when they are shown, float32 [n] seconds (index / video_fps, not the stored time).

    n is `rules.fps` times the duration rounded down, at most as many as `total_tokens` (None: the rules') allow at the
    smallest frame size (`min_pixels` of the message part, or the rules'), and at least 1, also where a short clip gives
    none. Raises DataError for a clip without frames or frame rate.
    """
    check_clip(total_frames, video_fps)
    total_pixels = (rules.total_tokens if total_tokens is None else total_tokens) * TOKEN_AREA
    frame_pixels = rules.min_frame_tokens * TOKEN_AREA if min_pixels is None else min_pixels
    most = int(total_pixels / frame_pixels)
    if rules.max_frames is not None:
        most = min(most, rules.max_frames)
    # The released order of operations: another one gives another frame at times.
    count = int(total_frames / video_fps * min(rules.fps, video_fps))
    indices = uniform_indices(total_frames, max(1, min(count, most)))
    return indices, (indices * (1 / video_fps)).astype(np.float32)


class FrameTagger:
    """Tells slow from fast frames while they are decoded; it keeps the latest slow frame and nothing else."""

    def __init__(self, height: int, width: int, rules: VideoRules):
        """`height` and `width` are those of the frames to come, as decoded."""
        self._size = smart_resize(height, width, _COMPARED_MIN_PIXELS, _COMPARED_MAX_PIXELS)
        self._rules = rules
        self._slow: tuple[torch.Tensor, torch.Tensor] | None = None

    def tag(self, frame: np.ndarray) -> int:
        """SLOW (0) or FAST (1) for the next frame, uint8 [height, width, 3]. The first frame is slow."""
        blocks = _hsv_blocks(resize_frames(frame[None], self._size)[0])
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


def video_sizes(
    tags: np.ndarray,
    height: int,
    width: int,
    rules: VideoRules,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    total_tokens: int | None = None,
) -> VideoSizes:
    """Sizes at which the frames of a height x width video fit its budget, if the frame minimum lets them.

    `tags` is uint8 [n] of `frame_tags`. The largest slow frame is found by bisection, a fast one gets
    `rules.fast_token_ratio` of its tokens. `min_pixels` of a message part can only raise the rules' minimum,
    `max_pixels` replaces their maximum, `total_tokens` their budget.
    Raises DataError for an aspect ratio above 200.
    """
    num_fast = int(np.count_nonzero(tags))
    num_slow = len(tags) - num_fast
    budget = rules.total_tokens if total_tokens is None else total_tokens
    rule_minimum = rules.min_frame_tokens * TOKEN_AREA
    least = rule_minimum if min_pixels is None else max(int(min_pixels), rule_minimum)
    most = rules.max_frame_tokens * TOKEN_AREA if max_pixels is None else max_pixels
    slow_tokens = _largest_slow_tokens(num_slow, num_fast, least, most, budget, rules.fast_token_ratio)
    slow = smart_resize(height, width, least, slow_tokens * TOKEN_PIXELS * TOKEN_PIXELS)
    fast_tokens = int(slow[0] * slow[1] / TOKEN_PIXELS / TOKEN_PIXELS * rules.fast_token_ratio)
    fast = smart_resize(height, width, least, max(fast_tokens * TOKEN_AREA, rule_minimum))
    return VideoSizes(slow, fast)


def resize_frames(frames: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [n, H, W, 3] to uint8 [n, *size, 3] by torch's antialiased bilinear kernel for uint8."""
    resized = F.interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2), size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())


def _largest_slow_tokens(num_slow: int, num_fast: int, min_pixels: int, max_pixels: int, budget: int, ratio: float) -> float:
    """The released bisection: the smallest token count per slow frame that exceeds `budget`, or the maximum.

    It ends one above the largest count that fits, and starts from limits that need not be whole tokens.
    """
    min_tokens = int(min_pixels / TOKEN_PIXELS / TOKEN_PIXELS)
    low = min_pixels / TOKEN_PIXELS / TOKEN_PIXELS
    high = max_pixels / TOKEN_PIXELS / TOKEN_PIXELS
    while low < high:
        middle = int(low + high) // 2
        if num_slow * middle + num_fast * max(int(ratio * middle), min_tokens) > budget:
            high = middle
        else:
            low = middle + 1
    return low


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
