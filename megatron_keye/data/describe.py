"""What an index holds of an image or video, read from its bytes once, by PyAV and Pillow, whatever the decoder of the run and the host."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from megatron_keye.data.items import Frames, Item, MediaRules, asked_pixels, asked_video_rules
from megatron_keye.data.media.frame_tags import frame_tags
from megatron_keye.data.media.image import image_dimensions
from megatron_keye.data.media.sampling import preview_indices, slow_fast_indices
from megatron_keye.data.media.video import iter_frames, probe


def describe(kind: str, blob: bytes, options: Mapping[str, float], rules: MediaRules) -> Item:
    """Read what planning needs from an encoded image or video; decodes the sampled frames of a Keye-VL-1.5 video.

    Raises DataError for bytes that cannot be decoded.
    """
    if kind == "image":
        return Item(*image_dimensions(blob), options)
    info = probe(blob)
    frames = sample_frames(info.num_frames, info.fps, options, rules)
    if rules.variant == "keye_vl_1_5":
        tags = frame_tags(iter_frames(blob, frames.numbers), asked_video_rules(options, rules))
        frames = replace(frames, tags=tags)
    return Item(info.height, info.width, options, frames)


def sample_frames(clip_frames: int, clip_fps: float, options: Mapping[str, float], rules: MediaRules) -> Frames:
    """Which frames of a clip the rules take, all tagged slow; as many as `items.count_frames`."""
    video = asked_video_rules(options, rules)
    if rules.variant == "keye_vl_1_5":
        numbers, timestamps_s = slow_fast_indices(clip_frames, clip_fps, video, asked_pixels(options, "min_pixels"))
        rate = len(numbers) / clip_frames * clip_fps
    else:
        numbers, rate = preview_indices(clip_frames, clip_fps, video)
        timestamps_s = (numbers / clip_fps).astype(np.float32)
    return Frames(numbers.astype(np.int32), timestamps_s, np.zeros(len(numbers), dtype=np.uint8), rate, clip_frames, clip_fps)
