"""M-RoPE positions against transformers where it follows the same rule, and against vectors of the released code where not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.contract.positions import mrope_positions

VISION = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)))
for oracle in (Qwen2_5_VLModel, Qwen3VLModel):
    VISION.get_vision_position_ids = oracle.get_vision_position_ids.__get__(VISION)

grids = st.builds(lambda h, w: PatchGrid(1, 2 * h, 2 * w), st.integers(1, 12), st.integers(1, 12))


@st.composite
def shapes_of_single_frames(draw) -> SampleShape:
    # transformers tells one item from the next by the text between them, so gaps are at least one token.
    segments = tuple(Segment(grid, draw(st.integers(1, 9))) for grid in draw(st.lists(grids, max_size=6)))
    tail = draw(st.integers(1, 9))
    return SampleShape(sum(s.gap_tokens + s.grid.num_tokens for s in segments) + tail, segments)


def transformers_positions(model_class, shape: SampleShape, kind: int) -> np.ndarray:
    """Positions by `model_class.get_rope_index`, every segment an image (kind 1) or a one-frame video (kind 2)."""
    types = torch.zeros(1, shape.num_tokens, dtype=torch.int32)
    for start, segment in zip(shape.visual_starts(), shape.segments, strict=True):
        types[0, start : start + segment.grid.num_tokens] = kind
    grid_rows = torch.tensor([[s.grid.t, s.grid.h, s.grid.w] for s in shape.segments], dtype=torch.long).reshape(-1, 3)
    names = {1: "image_grid_thw", 2: "video_grid_thw"}
    ids = torch.zeros(1, shape.num_tokens, dtype=torch.long)
    positions, _ = model_class.get_rope_index(VISION, ids, types, **{names[kind]: grid_rows})
    return positions[:, 0].numpy()


@settings(max_examples=60, deadline=None)
@given(shapes_of_single_frames())
def test_1_5_equals_qwen3_vl_with_one_row_per_frame(shape):
    positions = mrope_positions(shape, "keye_vl_1_5")
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions, transformers_positions(Qwen3VLModel, shape, kind=2))


@settings(max_examples=60, deadline=None)
@given(shapes_of_single_frames())
def test_preview_images_equal_qwen2_5_vl(shape):
    expected = transformers_positions(Qwen2_5_VLModel, shape, kind=1)
    np.testing.assert_array_equal(mrope_positions(shape, "keye_vl_preview"), expected)


def clip(grid: tuple[int, int, int], ticks_per_frame: float, before: int, after: int) -> SampleShape:
    segment = Segment(PatchGrid(*grid), before, ticks_per_frame)
    return SampleShape(before + segment.grid.num_tokens + after, (segment,))


@pytest.mark.parametrize(("ticks_per_frame", "last_id"), [(1.0, 17), (2.0, 18)])
def test_preview_clip_has_the_last_id_of_the_released_code(ticks_per_frame, last_id):
    # 4 text tokens, vision start, grid (4, 8, 12), vision end, 6 text tokens, at 0.5 and at 1 second per frame.
    shape = clip((4, 8, 12), ticks_per_frame, before=5, after=7)
    assert shape.num_tokens == 108
    assert mrope_positions(shape, "keye_vl_preview").max() == last_id


def test_time_can_win_over_height_and_width():
    # 12 frames of 4 x 6 tokens: the released code goes on 6 ids later than a rule that advances by max(H, W) alone.
    positions = mrope_positions(clip((12, 8, 12), 1.0, before=5, after=2), "keye_vl_preview")
    advance_by_size = 5 + 6
    assert positions[:, -2].tolist() == [advance_by_size + 6] * 3


def test_time_is_truncated_in_float32():
    shape = clip((4, 2, 2), 2 / 2.0011, before=0, after=0)
    assert mrope_positions(shape, "keye_vl_preview")[0].tolist() == [0, 0, 1, 2]
    # The product is just below 17 in float64, but 17 in float32.
    assert [int(17 * ticks) for ticks in (np.float64(0.99999999), np.float32(0.99999999))] == [16, 17]
    assert mrope_positions(clip((18, 2, 2), 0.99999999, before=0, after=0), "keye_vl_preview")[0, 17] == 17


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 60), st.integers(1, 300))
def test_time_follows_the_expression_of_the_released_code(fps, num_frames):
    tokens_per_second, second_per_grid = 2, torch.tensor(1 / fps)
    expected = (torch.arange(num_frames) * second_per_grid * tokens_per_second).long()
    positions = mrope_positions(clip((num_frames, 2, 2), tokens_per_second / fps, before=0, after=0), "keye_vl_preview")
    np.testing.assert_array_equal(positions[0], expected.numpy())


def test_frames_restart_height_and_width_at_the_clip_start():
    positions = mrope_positions(clip((2, 4, 4), 2.0, before=3, after=1), "keye_vl_preview")
    assert positions[:, 3:11].tolist() == [[3, 3, 3, 3, 5, 5, 5, 5], [3, 3, 4, 4] * 2, [3, 4, 3, 4] * 2]
    assert positions[:, 11].tolist() == [6, 6, 6]


def test_text_only_counts_up_and_nothing_is_empty():
    assert mrope_positions(SampleShape(4), "keye_vl_1_5").tolist() == [[0, 1, 2, 3]] * 3
    assert mrope_positions(SampleShape(0), "keye_vl_1_5").shape == (3, 0)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="one segment per frame"):
        mrope_positions(clip((2, 2, 2), 1.0, 0, 0), "keye_vl_1_5")
    with pytest.raises(ValueError, match="take 5 tokens, but the sample has 4"):
        mrope_positions(SampleShape(4, (Segment(PatchGrid(1, 2, 2), 4),)), "keye_vl_preview")
