"""Which frames of a clip are taken, as far as both variants agree."""

import math

import numpy as np
import torch

from megatron_keye.errors import DataError


def uniform_indices(total_frames: int, num_frames: int) -> np.ndarray:
    """int64 [num_frames]: frames spread evenly from the first to the last one, ties rounded to even.

    In torch's float32 linspace, whose rounding decides which of two frames is taken.
    """
    return torch.linspace(0, total_frames - 1, num_frames).round().long().numpy()


def check_clip(total_frames: int, video_fps: float) -> None:
    """Raises DataError for a clip without frames or without a usable frame rate."""
    if total_frames < 1 or not (math.isfinite(video_fps) and video_fps > 0):
        raise DataError(f"found a clip of {total_frames} frames at {video_fps} frames per second; expected one or more, at a rate above 0")
