"""Slow-fast video of Keye-VL-1.5: how many frames are taken, and how large the slow and the fast ones are.

Every number equals that of keye-vl-utils 1.5.2 for the preset `released`. Where that package fails (a clip that yields no frame), the rule
is stated here. Which frames are slow is found by `frame_tags`; their pixels are made by `resample.resize_bilinear`.
"""

from dataclasses import dataclass

import numpy as np

from megatron_keye.contract.media import TOKEN_PIXELS
from megatron_keye.data.media.resize import TOKEN_AREA, Size, smart_resize
from megatron_keye.data.media.rules import VideoRules, check_clip


@dataclass(frozen=True, slots=True)
class VideoSizes:
    """(height, width) in pixels of the slow and of the fast frames of one video."""

    slow: Size
    fast: Size


def count_frames(
    total_frames: int, video_fps: float, rules: VideoRules, min_pixels: int | None = None, total_tokens: int | None = None
) -> int:
    """How many frames of a clip are taken: `rules.fps` times its duration rounded down, at most as many as `total_tokens` (None: the
    rules') allow at the smallest frame size (`min_pixels` of the message part, or the rules'), and at least 1, also where a short clip
    gives none.

    Raises DataError for a clip without frames or frame rate.
    """
    check_clip(total_frames, video_fps)
    total_pixels = (rules.total_tokens if total_tokens is None else total_tokens) * TOKEN_AREA
    frame_pixels = rules.min_frame_tokens * TOKEN_AREA if min_pixels is None else min_pixels
    most = int(total_pixels / frame_pixels)
    if rules.max_frames is not None:
        most = min(most, rules.max_frames)
    # The released order of operations: another one gives another count at times.
    count = int(total_frames / video_fps * min(rules.fps, video_fps))
    return max(1, min(count, most))


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
