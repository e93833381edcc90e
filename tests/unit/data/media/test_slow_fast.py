"""Slow-fast sampling, tags, sizes and pixels equal those of keye-vl-utils 1.5.2 exactly."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_keye.config.schema import VideoConfig
from megatron_keye.data.media import video
from megatron_keye.data.media.frame_tags import FrameTagger, frame_tags
from megatron_keye.data.media.resample import resize_bilinear
from megatron_keye.data.media.resize import TOKEN_AREA
from megatron_keye.data.media.rules import VideoRules, video_rules
from megatron_keye.data.media.sampling import slow_fast_indices
from megatron_keye.data.media.slow_fast import video_sizes
from megatron_keye.errors import DataError

RELEASED = video_rules(VideoConfig(), "keye_vl_1_5")
REPORT = video_rules(VideoConfig(preset="report"), "keye_vl_1_5")
VIDEO_RATES = st.sampled_from([1.0, 5.0, 12.5, 15.0, 24000 / 1001, 25.0, 30000 / 1001, 30.0, 59.94, 60.0]) | st.floats(0.2, 120)


def _tags(num_slow: int, num_fast: int) -> np.ndarray:
    return np.repeat(np.array([0, 1], dtype=np.uint8), [num_slow, num_fast])


def _scenes(seed: int, num_frames: int, height: int, width: int) -> np.ndarray:
    """Drifting colour waves with cuts, black frames and noise: similarities on both sides of every threshold."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 40.0
    phase, drift, frames = rng.uniform(0, 9, 3), rng.uniform(0, 0.6), []
    for k in range(num_frames):
        if rng.random() < 0.15:
            phase, drift = rng.uniform(0, 9, 3), rng.uniform(0, 0.6)
        waves = np.stack([np.sin(x * (c + 1) / 2 + drift * k + phase[c]) * np.cos(y + phase[c]) for c in range(3)], axis=-1)
        frame = 127 + 120 * waves + rng.normal(0, rng.choice([0, 10, 60]), (height, width, 3))
        frames.append(np.clip(frame, 0, 255).astype(np.uint8) * (rng.random() > 0.1))
    return np.stack(frames)


# ---- which frames


@settings(max_examples=400, deadline=None)
@given(total=st.integers(1, 200_000), fps=VIDEO_RATES, wanted_fps=st.sampled_from([0.5, 1.0, 2.0]), cap=st.none() | st.integers(1, 2000))
@example(total=14, fps=30.0, wanted_fps=2.0, cap=None)
@example(total=300, fps=30000 / 1001, wanted_fps=2.0, cap=None)
def test_sampled_frame_count_equals_the_oracle(oracle, total, fps, wanted_fps, cap):
    rules = video_rules(VideoConfig(fps=wanted_fps, max_frames=cap), "keye_vl_1_5")
    part = {"fps": wanted_fps} if cap is None else {"fps": wanted_fps, "max_frames": cap}
    indices, timestamps = slow_fast_indices(total, fps, rules)
    expected = max(1, oracle.smart_nframes(part, total_frames=total, video_fps=fps))
    assert len(indices) == len(timestamps) == expected
    assert indices[0] == 0
    assert indices[-1] == (total - 1 if expected > 1 else 0)


@pytest.mark.parametrize(("total", "fps"), [(48, 30.0), (301, 30000 / 1001), (97, 23.976), (9, 3.7), (40, 1.0), (2, 1.5)])
def test_indices_and_timestamps_equal_the_oracle(fetch_video, total, fps):
    numbers = np.arange(total, dtype=np.uint16)
    frames = np.zeros((total, 28, 56, 3), dtype=np.uint8)
    frames[:, 0, 0, 0], frames[:, 0, 0, 1] = numbers % 256, numbers // 256
    taken, found = fetch_video(frames, fps)
    indices, timestamps = slow_fast_indices(total, fps, RELEASED)
    assert indices.dtype == np.int64
    assert timestamps.dtype == np.float32
    assert np.array_equal(indices, taken[:, 0, 0, 0].numpy() + 256 * taken[:, 1, 0, 0].numpy().astype(np.int64))
    assert np.array_equal(timestamps, found["timestamps"].numpy())


@pytest.mark.parametrize(
    ("total", "fps", "rules", "item", "count"),
    [
        (14, 30.0, RELEASED, {}, 1),  # keye-vl-utils takes no frame of it and fails
        (1, 30.0, RELEASED, {}, 1),
        (30 * 60 * 60, 30.0, RELEASED, {}, 1365),
        (30 * 60 * 60, 30.0, REPORT, {}, 1562),
        (30 * 60 * 60, 30.0, RELEASED, {"min_pixels": 96 * TOKEN_AREA}, 682),
        (30 * 60 * 60, 30.0, RELEASED, {"total_tokens": 4096}, 85),
        (30 * 60 * 60, 30.0, RELEASED, {"total_tokens": 10}, 1),
        (300, 1.0, RELEASED, {}, 300),
    ],
)
def test_frame_count_of(total, fps, rules, item, count):
    assert len(slow_fast_indices(total, fps, rules, **item)[0]) == count


@pytest.mark.parametrize(("total", "fps"), [(0, 30.0), (10, 0.0), (10, float("nan")), (10, float("inf"))])
def test_a_clip_without_frames_or_rate_is_refused(total, fps):
    with pytest.raises(DataError, match="expected one or more"):
        slow_fast_indices(total, fps, RELEASED)


# ---- slow and fast


@pytest.mark.parametrize("rules", [RELEASED, REPORT], ids=["released", "report"])
@pytest.mark.parametrize(("height", "width"), [(112, 196), (90, 161), (240, 320), (720, 60)])
def test_tags_equal_the_oracle(oracle, rules, height, width):
    frames = _scenes(height * width, 24, height, width)
    expected = oracle.extract_slow_fast_frames(torch.from_numpy(frames).permute(0, 3, 1, 2), rules.min_frame_similarity).numpy()
    tags = frame_tags(frames, rules)
    assert tags.dtype == np.uint8
    assert 0 < tags.sum() < len(tags), "the scenes must hold both kinds"
    assert np.array_equal(tags, expected)
    tagger = FrameTagger(height, width, rules)
    assert [tagger.tag(frame) for frame in frames] == tags.tolist()
    print(f"parity slow_fast_tags_{height}x{width} max_diff={np.abs(tags.astype(int) - expected).max()}")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(60, 200), width=st.integers(60, 200), threshold=st.sampled_from([0.5, 0.9, 0.95]))
def test_tags_equal_the_oracle_on_any_scene(oracle, seed, height, width, threshold):
    rules = VideoRules(2.0, 48, 768, 65536, threshold)
    frames = _scenes(seed, 6, height, width)
    expected = oracle.extract_slow_fast_frames(torch.from_numpy(frames).permute(0, 3, 1, 2), threshold)
    assert np.array_equal(frame_tags(frames, rules), expected.numpy())


def _solid(*colours: tuple[int, int, int]) -> np.ndarray:
    return np.stack([np.full((112, 112, 3), colour, dtype=np.uint8) for colour in colours])


@pytest.mark.parametrize(
    ("frames", "tags"),
    [
        (_solid((0, 0, 0), (0, 0, 0)), [0, 1]),  # no block is left to compare: not below the limit
        (_solid((255, 0, 0), (0, 0, 255)), [0, 1]),  # saturation and value dominate the cosine
        (_solid((255, 0, 0), (0, 0, 0), (0, 0, 0)), [0, 0, 1]),
        (_solid((7, 8, 9)), [0]),
    ],
)
def test_tags_of_plain_frames(oracle, frames, tags):
    assert frame_tags(frames, RELEASED).tolist() == tags
    assert oracle.extract_slow_fast_frames(torch.from_numpy(frames).permute(0, 3, 1, 2)).tolist() == tags


def test_nine_similar_blocks_of_ten_are_below_the_released_limit(oracle):
    before = np.full((280, 280, 3), 200, dtype=np.uint8)
    after = before.copy()
    after[:28] = 0  # one row of ten; 100 blocks of 28x28 are within the compared sizes, so nothing is resized
    frames = np.stack([before, after])
    expected = oracle.extract_slow_fast_frames(torch.from_numpy(frames).permute(0, 3, 1, 2)).tolist()
    assert frame_tags(frames, RELEASED).tolist() == expected == [0, 0]


@pytest.mark.parametrize("shape", [(28, 2000, 3), (2000, 28, 3)])
def test_frames_of_a_single_row_or_column_of_blocks_are_compared(shape):
    # The released code fails on a single row, whose dimension it drops before it masks.
    noise = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    assert frame_tags([noise, noise, np.zeros_like(noise)], RELEASED).tolist() == [0, 1, 0]


def test_no_frames_have_no_tags():
    assert frame_tags([], RELEASED).shape == (0,)


# ---- sizes


@pytest.mark.parametrize(
    ("num_slow", "num_fast", "height", "width", "slow", "fast"),
    [
        (10, 10, 720, 1280, (560, 1008), (308, 532)),
        (50, 150, 720, 1280, (532, 980), (280, 504)),
        (100, 300, 720, 1280, (364, 672), (196, 336)),
        (200, 600, 1080, 1920, (252, 476), (140, 252)),
        (400, 900, 1080, 1920, (140, 252), (140, 252)),
    ],
)
def test_sizes_of_known_videos(num_slow, num_fast, height, width, slow, fast):
    sizes = video_sizes(_tags(num_slow, num_fast), height, width, RELEASED)
    assert (sizes.slow, sizes.fast) == (slow, fast)


@settings(max_examples=150, deadline=None)
@given(
    num_slow=st.integers(1, 900),
    num_fast=st.integers(0, 900),
    height=st.integers(16, 1200),
    width=st.integers(16, 1200),
    min_pixels=st.none() | st.integers(1, 500_000),
    max_pixels=st.none() | st.integers(1, 900_000),
    total=st.sampled_from([1000, 16_384, 65_536, 75_000]),
)
@example(num_slow=1, num_fast=0, height=1080, width=1920, min_pixels=40_001, max_pixels=300_001, total=65_536)
def test_sizes_equal_the_oracle(oracle, num_slow, num_fast, height, width, min_pixels, max_pixels, total):
    tags = _tags(num_slow, num_fast)
    part = {"video": "clip.mp4", "min_pixels": min_pixels, "max_pixels": max_pixels, "video_total_pixels": total * TOKEN_AREA}
    part = {key: value for key, value in part.items() if value is not None}
    shape_only = torch.empty((1, 3, height, width), dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "_read_video_decord", lambda _: (shape_only, None, torch.from_numpy(tags.astype(np.int32))))
        _, found = oracle.fetch_video(part)
    sizes = video_sizes(tags, height, width, RELEASED, min_pixels, max_pixels, total)
    assert sizes.slow == (found["height"], found["width"])
    assert sizes.fast == (found["fast_height"], found["fast_width"])


# ---- a whole clip, and pixels


@pytest.mark.parametrize("preset", ["released", "report"])
def test_a_decoded_clip_equals_the_oracle(encode_clip, fetch_video, preset):
    rules = video_rules(VideoConfig(preset=preset), "keye_vl_1_5")
    blob = encode_clip(num_frames=200, g="30", bf="2")
    info = video.probe(blob)
    frames = video.decode_frames(blob, range(info.num_frames))
    part = {"min_frame_similarity": rules.min_frame_similarity, "video_total_pixels": rules.total_tokens * TOKEN_AREA}
    taken, found = fetch_video(frames, info.fps, **part)

    indices, timestamps = slow_fast_indices(info.num_frames, info.fps, rules)
    tags = frame_tags(video.iter_frames(blob, indices), rules)
    sizes = video_sizes(tags, info.height, info.width, rules)
    assert np.array_equal(frames[indices], taken.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(timestamps, found["timestamps"].numpy())
    assert np.array_equal(tags, found["frame_types"].numpy())
    assert sizes.slow + sizes.fast == (found["height"], found["width"], found["fast_height"], found["fast_width"])
    print(f"parity slow_fast_clip_{preset} max_diff={np.abs(timestamps - found['timestamps'].numpy()).max()}")


@pytest.mark.parametrize("size", [(56, 112), (84, 140), (280, 252), (100, 160)])
def test_resized_pixels_are_those_of_the_whole_batch(size):
    frames = _scenes(1, 5, 100, 160)
    batch = F.interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), size, mode="bilinear", antialias=True)
    single = np.stack([resize_bilinear(frame, size) for frame in frames])
    assert single.dtype == np.uint8
    assert np.array_equal(single, batch.permute(0, 2, 3, 1).numpy())
    print(f"parity slow_fast_resize_{size[0]}x{size[1]} max_diff={np.abs(single - batch.permute(0, 2, 3, 1).numpy()).max()}")
