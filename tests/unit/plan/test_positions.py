"""Positions of packed rows: every document as if it were alone, its padding after it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.contract.positions import mrope_positions
from megatron_keye.plan.positions import row_positions
from megatron_keye.plan.types import Document, Row

VARIANTS = ("keye_vl_preview", "keye_vl_1_5")
grids = st.builds(PatchGrid, st.just(1), st.sampled_from([2, 4, 10]), st.sampled_from([2, 6]))
segments = st.lists(st.builds(Segment, grids, st.integers(0, 5)), max_size=3)


@st.composite
def rows(draw):
    documents, start = [], 0
    for sample in range(draw(st.integers(1, 4))):
        inside = tuple(draw(segments))
        used = sum(s.gap_tokens + s.grid.num_tokens for s in inside)
        shape = SampleShape(used + draw(st.integers(0, 9)), inside)
        padded = shape.num_tokens + draw(st.integers(0 if shape.num_tokens else 1, 7))
        documents.append(Document(sample, shape, start, padded))
        start += padded
    return Row(tuple(documents), start)


@pytest.mark.parametrize("variant", VARIANTS)
@given(row=rows())
def test_a_document_has_the_positions_it_has_alone(variant, row):
    positions = row_positions(row, variant)
    assert positions.shape == (3, row.num_tokens)
    assert positions.dtype == np.int64
    for document in row.documents:
        mine = positions[:, document.start : document.start + document.padded_tokens]
        text, padding = np.split(mine, [document.shape.num_tokens], axis=1)
        alone = mrope_positions(document.shape, variant)
        assert np.array_equal(text, alone)
        # Padding is text: past everything before it, one further per token, the same on all axes.
        first = alone.max() + 1 if alone.size else 0
        assert np.array_equal(padding, np.broadcast_to(first + np.arange(padding.shape[1]), padding.shape))


def test_padding_after_a_clip_by_hand():
    clip = SampleShape(4, (Segment(PatchGrid(3, 2, 2), gap_tokens=1, ticks_per_frame=2.0),))
    row = Row((Document(0, clip, 0, 6), Document(1, SampleShape(1), 6, 2)), 8)
    assert row_positions(row, "keye_vl_preview").tolist() == [
        [0, 1, 3, 5, 6, 7, 0, 1],
        [0, 1, 1, 1, 6, 7, 0, 1],
        [0, 1, 1, 1, 6, 7, 0, 1],
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_row_is_one_run_of_padding(variant):
    assert row_positions(Row((), 4), variant).tolist() == [[0, 1, 2, 3]] * 3
