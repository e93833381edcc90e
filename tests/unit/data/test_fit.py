"""The policy for samples that do not fit a row, swept over generated samples and row lengths."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.config.schema import ImageConfig, VideoConfig
from megatron_keye.data.fit import CLOSING_TOKENS, Fitted, Rejected, SampleFacts, fit, row_limit_tokens
from megatron_keye.data.items import Frames, Item, media_rules, resolve

VARIANTS = ("keye_vl_1_5", "keye_vl_preview")
RULES = {variant: media_rules(ImageConfig(max_tokens=1000), VideoConfig(), variant) for variant in VARIANTS}


def video(height: int, width: int, tags: list[int]) -> Item:
    numbers = np.arange(len(tags), dtype=np.int32)
    frames = Frames(numbers, (numbers / 2).astype(np.float32), np.array(tags, np.uint8), 2.0, len(tags), 2.0)
    return Item(height, width, {}, frames)


sides = st.integers(20, 1500)
images = st.builds(lambda h, ratio: Item(h, max(8, int(h * ratio))), sides, st.floats(0.3, 3))
tags_after_first = st.lists(st.integers(0, 1), max_size=9)
videos = st.builds(lambda h, ratio, tags: video(h, int(h * ratio), [0, *tags]), sides, st.floats(0.5, 2), tags_after_first)


@st.composite
def samples(draw, variant: str) -> SampleFacts:
    items = draw(st.lists(st.one_of(images, videos), max_size=4))
    per_frame = variant == "keye_vl_1_5"
    num_segments = sum(item.num_segments if per_frame else 1 for item in items)
    gaps = tuple(draw(st.lists(st.integers(1, 60), min_size=num_segments, max_size=num_segments)))
    tail = draw(st.integers(2, 3000))
    text_tokens = sum(gaps) + tail
    return SampleFacts(tuple(items), gaps, tail, draw(st.one_of(st.none(), st.integers(0, text_tokens - 1))))


def visual_tokens(result: Fitted) -> int:
    return sum(item.layout.num_tokens for item in result.items)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), limit=st.integers(16, 6000))
def test_the_policy_holds(data, limit, variant):
    sample, rules = data.draw(samples(variant)), RULES[variant]
    full = [resolve(item, rules) for item in sample.items]
    smallest = [resolve(item, rules, rules.image_min_tokens if item.frames is None else 1) for item in sample.items]
    full_tokens, least_tokens = (sum(item.layout.num_tokens for item in items) for items in (full, smallest))
    must_stay = sum(sample.gap_tokens) + (CLOSING_TOKENS if sample.items else 0)
    if sample.first_supervised is not None:
        must_stay = max(must_stay, sample.first_supervised + 1)

    result = fit(sample, rules, limit)
    if isinstance(result, Rejected):
        assert must_stay + least_tokens > limit
        return
    shape = result.shape
    assert shape.num_tokens <= limit
    assert shape.num_visual_tokens == visual_tokens(result)
    assert [s.gap_tokens for s in shape.segments] == list(sample.gap_tokens)
    kept_text = shape.num_tokens - shape.num_visual_tokens
    assert must_stay <= kept_text <= sample.text_tokens
    if sample.text_tokens + full_tokens <= limit:
        assert list(result.items) == full
    if kept_text < sample.text_tokens:  # text is cut only where the smallest media leave no room for it
        assert sample.text_tokens + least_tokens > limit
        assert shape.num_tokens == limit
        assert shape.num_visual_tokens <= max(limit // 2, least_tokens)


def test_media_shrink_together_and_use_the_room():
    picture = Item(700, 700)  # 625 tokens
    sample = SampleFacts((picture, picture), (2, 2), 100, 50)
    result = fit(sample, RULES["keye_vl_1_5"], 704)
    assert result.items[0] == result.items[1]
    assert 550 <= visual_tokens(result) <= 600
    assert result.shape.num_tokens == visual_tokens(result) + 104


def test_text_is_cut_only_when_media_cannot_shrink_enough_and_media_keep_half_a_row():
    sample = SampleFacts((Item(700, 700),), (2,), 2000, 50)
    result = fit(sample, RULES["keye_vl_1_5"], 1024)
    assert 450 <= visual_tokens(result) <= 512
    assert result.shape.num_tokens == 1024
    assert visual_tokens(fit(replace(sample, tail_tokens=1010), RULES["keye_vl_1_5"], 1024)) <= 12


def test_text_that_must_stay_takes_room_from_media():
    sample = SampleFacts((Item(700, 700),), (900,), 2000, 50)
    assert visual_tokens(fit(sample, RULES["keye_vl_1_5"], 1024)) <= 1024 - 902
    assert "a row holds 800" in fit(sample, RULES["keye_vl_1_5"], 800).reason


def test_tokens_that_close_the_last_medium_are_never_cut():
    sample = SampleFacts((Item(700, 700),), (900,), 2000, 50)
    smallest = 4
    assert fit(sample, RULES["keye_vl_1_5"], 900 + smallest + 2).shape.num_tokens == 906
    assert isinstance(fit(sample, RULES["keye_vl_1_5"], 900 + smallest + 1), Rejected)


def test_a_sample_whose_answer_would_be_cut_off_is_rejected():
    sample = SampleFacts((), (), 2000, first_supervised=1500)
    assert isinstance(fit(sample, RULES["keye_vl_1_5"], 1500), Rejected)
    assert fit(sample, RULES["keye_vl_1_5"], 1501).shape.num_tokens == 1501


def test_a_video_shrinks_to_its_smallest_frames_and_not_below():
    clip = video(720, 1280, [0, 1] * 10)
    sample = SampleFacts((clip,), (3,) * 20, 10, 65)
    tokens = [visual_tokens(fit(sample, RULES["keye_vl_1_5"], limit)) for limit in (8192, 4096, 2048)]
    assert tokens == sorted(tokens, reverse=True)
    assert len(set(tokens)) == 3
    assert isinstance(fit(sample, RULES["keye_vl_1_5"], 20 * 40), Rejected)


@pytest.mark.parametrize(("seq_length", "multiple", "limit"), [(1024, 64, 1024), (1000, 64, 960), (63, 64, 0)])
def test_the_row_limit_leaves_room_for_padding(seq_length, multiple, limit):
    assert row_limit_tokens(seq_length, multiple) == limit
