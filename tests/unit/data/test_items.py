"""One image or video: what its record may ask for, and that its patches are those of its own frames in their own sizes."""

import numpy as np
import pytest

from megatron_keye.config.schema import ImageConfig, VideoConfig
from megatron_keye.data.describe import describe, sample_frames
from megatron_keye.data.items import Item, count_frames, load_patches, media_rules, resolve
from megatron_keye.data.media import preview_video
from megatron_keye.data.media.decoder import PYAV
from megatron_keye.data.media.patches import patchify
from megatron_keye.data.media.resample import resize_bilinear
from megatron_keye.data.media.video import decode_frames
from megatron_keye.errors import DataError
from tests.unit.data.corpus import mp4, png

KEYE_1_5 = media_rules(ImageConfig(), VideoConfig(), "keye_vl_1_5")
PREVIEW = media_rules(ImageConfig(), VideoConfig(), "keye_vl_preview")


@pytest.fixture(scope="module")
def clip() -> bytes:
    """4 seconds at 6 frames a second, of which every third is sampled; colours change after 2 s."""
    return mp4(24, 392, 448, fps=6, cut=12)


def test_a_1_5_video_is_its_sampled_frames_in_slow_and_fast_sizes(clip):
    item = describe("video", clip, {}, KEYE_1_5)
    assert item.frames.numbers.tolist() == [0, 3, 7, 10, 13, 16, 20, 23]
    assert item.frames.tags.tolist() == [0, 1, 1, 1, 0, 1, 1, 1]
    resolved = resolve(item, KEYE_1_5)
    slow, fast = resolved.sizes
    assert slow > fast
    expected = [
        patchify(resize_bilinear(frame, fast if tag else slow)[None])
        for frame, tag in zip(decode_frames(clip, item.frames.numbers), item.frames.tags, strict=True)
    ]
    for patches, frame, grid in zip(load_patches(item, resolved, clip, "keye_vl_1_5", PYAV), expected, resolved.layout.grids, strict=True):
        np.testing.assert_array_equal(patches, frame)
        assert len(patches) == grid.num_patches


def test_a_preview_clip_is_one_segment_of_all_its_frames(clip):
    item = describe("video", clip, {}, PREVIEW)
    resolved = resolve(item, PREVIEW)
    frames = preview_video.resize_frames(decode_frames(clip, item.frames.numbers), resolved.sizes)
    (patches,) = load_patches(item, resolved, clip, "keye_vl_preview", PYAV)
    np.testing.assert_array_equal(patches, patchify(frames))
    assert resolved.layout.grids[0].t == 8
    assert resolved.layout.ticks_per_frame == 1.0  # 2 ids a second, 2 frames a second


@pytest.mark.parametrize(
    ("options", "num_frames"), [({}, 20), ({"fps": 1.0}, 10), ({"max_frames": 7}, 7), ({"total_pixels": 784 * 48 * 5}, 5)]
)
def test_a_record_can_ask_for_fewer_frames(options, num_frames):
    assert len(sample_frames(300, 30.0, options, KEYE_1_5).numbers) == count_frames(300, 30.0, options, KEYE_1_5) == num_frames


def test_a_record_cannot_ask_for_more_frames_than_the_settings_allow():
    rules = media_rules(ImageConfig(), VideoConfig(max_frames=6), "keye_vl_1_5")
    assert len(sample_frames(300, 30.0, {"max_frames": 9}, rules).numbers) == 6


def video_tokens(options: dict, rules=KEYE_1_5, max_tokens: int | None = None) -> int:
    return resolve(Item(720, 1280, options, sample_frames(300, 30.0, options, rules)), rules, max_tokens).layout.num_tokens


@pytest.mark.parametrize("rules", [KEYE_1_5, PREVIEW])
def test_limits_of_a_record_bound_a_video(rules):
    full = video_tokens({}, rules)
    assert video_tokens({"max_pixels": 784 * 200}, rules) <= 20 * 200 < full
    assert video_tokens({"total_pixels": 784 * 4000}, rules) < full
    assert video_tokens({}, rules, max_tokens=4000) <= 4000


def test_limits_of_a_record_bound_an_image():
    def tokens(max_tokens=None, **options):
        return resolve(Item(700, 700, options), KEYE_1_5, max_tokens).layout.num_tokens

    assert tokens() == 625
    assert 80 <= tokens(max_pixels=784 * 100) <= 100
    assert tokens(min_pixels=784 * 900) >= 900
    assert tokens(resized_height=280, resized_width=560) == 200
    assert tokens(50, min_pixels=784 * 900) <= 50
    assert tokens(50, resized_height=280, resized_width=560) <= 50


@pytest.mark.parametrize("rules", [KEYE_1_5, PREVIEW])
def test_media_of_another_size_than_described_are_refused(clip, rules):
    for kind, blob in (("image", png(50, 60, 0)), ("video", clip)):
        item = describe(kind, blob, {}, rules)
        other = Item(item.height, item.width + 1, {}, item.frames)
        with pytest.raises(DataError, match="the media changed after they were indexed"):
            load_patches(other, resolve(other, rules), blob, rules.variant, PYAV)
