"""Preview's video path: numbers made with keye-vl-utils 1.0.0, whose kernel (torchvision) is checked against Pillow's."""

import numpy as np
import pytest
from PIL import Image

from megatron_keye.config.schema import VideoConfig
from megatron_keye.data.media.preview_video import frame_steps, resize_frames
from megatron_keye.data.media.resize import TOKEN_AREA
from megatron_keye.data.media.rules import video_rules
from megatron_keye.data.media.sampling import preview_indices
from megatron_keye.errors import DataError

RULES = video_rules(VideoConfig(), "keye_vl_preview")


@pytest.mark.parametrize(
    ("total", "fps", "max_frames", "count", "start", "last", "rate"),
    [
        (48, 30.0, None, 4, [0, 16, 31, 47], 47, 2.5),
        (301, 30000 / 1001, None, 20, [0, 16, 32, 47], 300, 1.9913641176099648),
        (300, 30.0, None, 20, [0, 16, 31, 47], 299, 2.0),
        (18000, 30.0, None, 768, [0, 23, 47, 70], 17999, 1.28),
        (18000, 30.0, 101, 100, [0, 182, 364, 545], 17999, 0.16666666666666669),
        (7, 1.5, None, 6, [0, 1, 2, 4], 6, 1.2857142857142856),
        (3, 30.0, None, 2, [0, 2], 2, 20.0),
        (1, 30.0, None, 1, [0], 0, 30.0),  # refused by keye-vl-utils
    ],
)
def test_sampled_frames(total, fps, max_frames, count, start, last, rate):
    rules = video_rules(VideoConfig(max_frames=max_frames), "keye_vl_preview")
    indices, sample_fps = preview_indices(total, fps, rules)
    assert indices.dtype == np.int64
    assert (len(indices), indices[: len(start)].tolist(), indices[-1], sample_fps) == (count, start, last, rate)


def test_a_clip_without_frames_is_refused():
    with pytest.raises(DataError, match="clip of 0 frames"):
        preview_indices(0, 30.0, RULES)


@pytest.mark.parametrize(
    ("height", "width", "num_frames", "item", "size"),
    [
        (720, 1280, 4, {}, (560, 1008)),
        (1080, 1920, 768, {}, (336, 644)),
        (1080, 1920, 100, {}, (560, 1008)),
        (90, 120, 6, {}, (280, 392)),
        (480, 640, 2, {}, (476, 644)),
        (480, 640, 240, {"max_pixels": 200 * TOKEN_AREA}, (336, 448)),
        (480, 640, 240, {"resized_height": 100, "resized_width": 300}, (112, 308)),
    ],
)
def test_frame_sizes(height, width, num_frames, item, size):
    assert frame_steps(height, width, num_frames, RULES, **item) == (size,)


def test_a_large_minimum_meets_the_image_processor():
    first, second = frame_steps(4800, 6400, 240, RULES, min_pixels=1500 * TOKEN_AREA)
    assert first == (952, 1260)
    assert second == (868, 1148)
    frames = np.random.default_rng(0).integers(0, 256, (1, 30, 40, 3), dtype=np.uint8)
    assert resize_frames(frames, ((56, 84), (28, 56))).shape == (1, 28, 56, 3)


def test_half_a_requested_size_is_refused():
    with pytest.raises(DataError, match="expected both or neither"):
        frame_steps(480, 640, 4, RULES, resized_height=28)


@pytest.mark.parametrize("size", [(56, 84), (140, 196)])
def test_pixels_are_those_of_a_bicubic_resize(size):
    y, x = np.mgrid[0:100, 0:150] / 9.0
    smooth = np.stack([np.sin(x + y), np.cos(x), np.sign(np.sin(y))], axis=-1)
    frames = (127 + 127 * smooth).astype(np.uint8)[None].repeat(2, axis=0)
    pixels = resize_frames(frames, (size,))
    expected = np.array(Image.fromarray(frames[0]).resize(size[::-1], Image.Resampling.BICUBIC))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels[0], pixels[1])
    difference = np.abs(pixels[0].astype(int) - expected).max()
    assert difference <= 1, "Pillow works in fixed point and may round one level away"
    print(f"parity preview_resize_{size[0]}x{size[1]} max_diff={difference}")
