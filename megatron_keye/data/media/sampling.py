"""Which frames of a clip are taken, when a set is indexed. How many they are is in `slow_fast` and `preview_video`."""

import numpy as np
import torch

from megatron_keye.data.media import preview_video, slow_fast
from megatron_keye.data.media.rules import VideoRules


def slow_fast_indices(
    total_frames: int, video_fps: float, rules: VideoRules, min_pixels: int | None = None, total_tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Frames to take for Keye-VL-1.5, int64 [n], and when they are shown, float32 [n] seconds (index / video_fps, not the stored time).

    n is `slow_fast.count_frames` of the same arguments. Raises DataError for a clip without frames or frame rate.
    """
    indices = _uniform_indices(total_frames, slow_fast.count_frames(total_frames, video_fps, rules, min_pixels, total_tokens))
    return indices, (indices * (1 / video_fps)).astype(np.float32)


def preview_indices(total_frames: int, video_fps: float, rules: VideoRules) -> tuple[np.ndarray, float]:
    """Frames to take for Preview, int64 [n], and their rate in frames per second, from which temporal positions follow.

    n is `preview_video.count_frames` of the same arguments. Raises DataError for a clip without frames or frame rate.
    """
    num_frames = preview_video.count_frames(total_frames, video_fps, rules)
    return _uniform_indices(total_frames, num_frames), num_frames / total_frames * video_fps


def _uniform_indices(total_frames: int, num_frames: int) -> np.ndarray:
    """int64 [num_frames]: frames spread evenly from the first to the last one, ties rounded to even.

    In torch's float32 linspace, whose rounding decides which of two frames is taken.
    """
    return torch.linspace(0, total_frames - 1, num_frames).round().long().numpy()
