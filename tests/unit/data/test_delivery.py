"""What each rank gets is what it needs: its slice of every row at the ends of the pipeline, and the pixels that it encodes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.contract.media import PATCH_VALUES, PatchGrid, SampleShape, Segment
from megatron_keye.contract.rows import RowTokens, next_tokens, num_supervised
from megatron_keye.data.delivery import parcel_bytes, parcels, unpack, within_one_rank
from megatron_keye.data.loader import ReplicaData, patch_counts
from megatron_keye.parallel.grid import RankGrid
from megatron_keye.plan.context_split import local_tokens
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.step import PlanSettings, place_members

COST = CostModel(decoder_token=1000, decoder_pair=3, vision_patch=400, vision_pair=2, projector_token=50)
grids = st.builds(RankGrid, st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
sizes = st.lists(st.tuples(st.sampled_from([2, 4]), st.sampled_from([2, 6])), max_size=3)


@st.composite
def one_shape(draw):
    segments = tuple(Segment(PatchGrid(1, height, width), 3) for height, width in draw(sizes))
    return SampleShape(draw(st.integers(1, 60)) + sum(3 + segment.grid.num_tokens for segment in segments), segments)


shapes = st.lists(one_shape(), min_size=1, max_size=8)


def loaded_step(shapes, grid):
    """A replica's plan and random data for it."""
    multiple = 2 * grid.cp * grid.tp
    config = PlanSettings(0, len(shapes), 120 * multiple, multiple, 12, 1, tuple(range(grid.replica_size)), 1, COST)
    (plan,) = place_members(range(len(shapes)), shapes, config)
    random = np.random.default_rng(0)
    rows = [RowTokens(random.integers(0, 150_000, row.num_tokens), random.random(row.num_tokens) < 0.5) for row in plan.rows]
    patches = {}
    for task in plan.tasks:
        count = plan.rows[task.microbatch].documents[task.document].shape.segments[task.segment].grid.num_patches
        patches.setdefault((task.encoder, task.round), []).append(random.integers(0, 256, (count, PATCH_VALUES), dtype=np.uint8))
    return plan, ReplicaData(rows, patches, [], 0)


@settings(deadline=None, max_examples=60)
@given(shapes, grids)
def test_every_rank_gets_its_slice_and_its_pixels(shapes, grid):
    plan, data = loaded_step(shapes, grid)
    counts = patch_counts(plan, grid.replica_size)
    sizes, sent = parcel_bytes(plan, counts, grid), parcels(data, plan, grid)
    for rank in range(grid.replica_size):
        parcel = np.concatenate([np.empty(0, np.uint8), *(array.reshape(-1).view(np.uint8) for array in sent[rank])])
        assert len(parcel) == sizes[rank]
        rows, patches = unpack(torch.from_numpy(parcel), plan, counts, grid, rank)
        stage, cp_rank = grid.coordinate(rank, "pp"), grid.coordinate(rank, "cp")
        for row, tokens, local in zip(plan.rows, data.rows, rows, strict=True):
            own = local_tokens(row.cu_seqlens, grid.cp, cp_rank)
            assert (local.token_ids is None, local.targets is None) == (stage > 0, stage < grid.pp - 1)
            if local.token_ids is not None:
                np.testing.assert_array_equal(local.token_ids, tokens.token_ids[own])
            if local.targets is not None:
                labels, supervised = next_tokens(tokens, row.cu_seqlens)
                np.testing.assert_array_equal(local.targets >> 1, labels[own])
                np.testing.assert_array_equal(local.targets & 1, supervised[own])
        for number, found in enumerate(patches):
            expected = data.patches.get((rank, number), [])
            np.testing.assert_array_equal(found, np.concatenate([np.empty((0, PATCH_VALUES), np.uint8), *expected]))


@settings(deadline=None, max_examples=30)
@given(shapes, grids)
def test_supervised_tokens_are_those_of_the_whole_rows(shapes, grid):
    """Over the context-parallel slices of the last stage."""
    plan, data = loaded_step(shapes, grid)
    last = [grid.rank(cp=cp, pp=grid.pp - 1) for cp in range(grid.cp)]
    sent = parcels(data, plan, grid)
    kinds = 1 + (grid.pp == 1)
    targets = [array for rank in last for array in sent[rank][(kinds - 1) * len(plan.rows) : kinds * len(plan.rows)]]
    total = sum(num_supervised(tokens, row.cu_seqlens) for tokens, row in zip(data.rows, plan.rows, strict=True))
    assert sum(int((array & 1).sum()) for array in targets) == total


def test_the_middle_of_a_pipeline_gets_pixels_alone():
    grid = RankGrid(pp=3)
    plan, _ = loaded_step([SampleShape(40)], grid)
    assert parcel_bytes(plan, patch_counts(plan, grid.replica_size), grid) == [4 * plan.rows[0].num_tokens, 0, 4 * plan.rows[0].num_tokens]


def test_one_rank_needs_no_transport():
    plan, data = loaded_step([SampleShape(40), SampleShape(30, (Segment(PatchGrid(1, 4, 4), 3),))], RankGrid())
    rows, patches = within_one_rank(data, plan)
    assert rows[0].token_ids.tolist() == data.rows[0].token_ids.tolist()
    assert sum(len(own) for own in patches) == 16


@pytest.mark.parametrize("cp", [1, 2])
def test_a_slice_is_half_of_the_tokens_at_cp_2(cp):
    plan, _ = loaded_step([SampleShape(64)], RankGrid(cp=2))
    assert parcel_bytes(plan, patch_counts(plan, cp), RankGrid(cp=cp)) == [8 * 64 // cp] * cp
