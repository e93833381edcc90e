"""Video of Keye-VL-8B-Preview: an even number of frames of one size, as keye-vl-utils 1.0.0 and its image processor make them."""

import math

import numpy as np

from megatron_keye.data.media import torch_resize
from megatron_keye.data.media.image import resize_image
from megatron_keye.data.media.resize import (
    PREVIEW_FETCH,
    PREVIEW_PROCESSOR,
    TOKEN_AREA,
    PixelLimits,
    Size,
    requested_size,
    smart_resize,
    with_processor_step,
)
from megatron_keye.data.media.rules import VideoRules, check_clip

_FRAME_MULTIPLE = 2
_MIN_FRAMES = 4
_MIN_SLACK = 1.05
"""The largest frame may always exceed the smallest by this factor, whatever the budget."""


def count_frames(total_frames: int, video_fps: float, rules: VideoRules) -> int:
    """How many frames of a clip are taken: `rules.fps` times its duration, at least 4, at most `rules.max_frames` and the clip's own,
    rounded down to even. A clip of one frame, which the released code refuses, gives that frame.

    Raises DataError for a clip without frames or frame rate.
    """
    check_clip(total_frames, video_fps)
    most = min(rules.max_frames or total_frames, total_frames)
    count = min(max(total_frames / video_fps * rules.fps, _MIN_FRAMES), most)
    return max(1, math.floor(count / _FRAME_MULTIPLE) * _FRAME_MULTIPLE)


def frame_steps(
    height: int,
    width: int,
    num_frames: int,
    rules: VideoRules,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    resized_height: int | None = None,
    resized_width: int | None = None,
    processor: PixelLimits = PREVIEW_PROCESSOR,
) -> tuple[Size, ...]:
    """Sizes for `resize_frames`, the last being what the ViT sees. Arguments as in `resize.resize_steps`.

    The budget is spread over pairs of frames, although the model does not merge them, so a clip can take twice
    `rules.total_tokens`; this is the released behaviour. Raises DataError for an aspect ratio above 200.
    """
    requested = requested_size(resized_height, resized_width)
    if requested is not None:
        first = smart_resize(*requested, PREVIEW_FETCH.min_pixels, PREVIEW_FETCH.max_pixels)
        return with_processor_step(first, processor)
    least = rules.min_frame_tokens * TOKEN_AREA if min_pixels is None else min_pixels
    share = rules.total_tokens * TOKEN_AREA / num_frames * _FRAME_MULTIPLE
    most = max(min(rules.max_frame_tokens * TOKEN_AREA, share), int(least * _MIN_SLACK))
    if max_pixels is not None:
        most = min(most, max_pixels)
    return with_processor_step(smart_resize(height, width, least, most), processor)


def resize_frames(frames: np.ndarray, sizes: tuple[Size, ...]) -> np.ndarray:
    """uint8 [n, H, W, 3] to uint8 [n, h, w, 3], through every size in turn.

    The first resize is torch's antialiased bicubic one in float32; a second one is Pillow's, as in the image processor.
    """
    return np.stack([resize_image(frame, sizes[1:]) for frame in torch_resize.resize_bicubic(frames, sizes[0])])
