"""Costs of many samples at once are those of each alone, and every replica can be planned alone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.errors import PlanError
from megatron_keye.plan.assignment import Assignment, AssignmentRules, assign_samples
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.digest import assignment_digest
from megatron_keye.plan.step import PlanSettings, place_members, replica_plan, shape_costs, step_costs
from megatron_keye.plan.table import SampleTable

COST = CostModel(decoder_token=1000, decoder_pair=3, vision_patch=400, vision_pair=2, projector_token=50)
SETTINGS = PlanSettings(1, 16, 512, 8, 256, 2, (0, 1), 1, COST)

grids = st.builds(PatchGrid, st.integers(1, 2), st.sampled_from([2, 4]), st.sampled_from([2, 4]))
segment_lists = st.lists(st.builds(Segment, grids, st.just(1)), max_size=6).map(tuple)
shape_lists = st.lists(st.builds(SampleShape, st.integers(0, 512), segment_lists), min_size=1, max_size=20)


@settings(deadline=None)
@given(shape_lists, st.data())
def test_all_at_once_is_each_alone(shapes, data):
    samples = np.array(data.draw(st.lists(st.integers(0, len(shapes) - 1), max_size=30)), np.int64)
    table = SampleTable.of(shapes)
    together = table.step_costs(samples, COST, 8, 512)
    for ours, expected in zip(together, step_costs(samples.tolist(), shapes, SETTINGS), strict=True):
        assert ours.tolist() == expected.tolist()
    assert table.window_costs(samples, COST).tolist() == shape_costs(shapes, samples, COST).tolist()


def test_frames_of_one_size_are_one_run():
    frames = (Segment(PatchGrid(1, 4, 4), 2),) * 100 + (Segment(PatchGrid(1, 2, 8), 2),) * 50 + (Segment(PatchGrid(1, 2, 2), 2),)
    table = SampleTable.of([SampleShape(5), SampleShape(1000, frames)])
    assert table.first_run.tolist() == [0, 0, 2]
    assert table.run_segments.tolist() == [150, 1]


def test_a_sample_longer_than_a_row_is_named():
    table = SampleTable.of([SampleShape(3), SampleShape(505)])
    with pytest.raises(PlanError, match=r"Sample 1 has 505 tokens, 512 with padding .* a row holds 511"):
        table.step_costs(np.array([0, 1]), COST, 8, 511)


@pytest.mark.parametrize("barrier", ["step", "phase", "microbatch"])
def test_a_replica_planned_alone_is_the_one_of_the_whole_plan(barrier):
    rng = np.random.default_rng(0)
    image = Segment(PatchGrid(1, 4, 4), 1)
    shapes = [SampleShape(int(rng.integers(60, 500)), (image,) * int(rng.integers(0, 9))) for _ in range(40)]
    config = replace(SETTINGS, num_replicas=4, barrier=barrier)
    members = list(range(40))
    costs = SampleTable.of(shapes).step_costs(np.array(members), COST, 8, 512)
    assignment = assign_samples(costs, AssignmentRules(4, 512, 1, barrier))
    whole = place_members(members, shapes, config)
    assert tuple(replica_plan(members, shapes, assignment, replica, config) for replica in range(4)) == whole


def test_the_digest_sees_every_difference():
    base = (3, (5, 6, 7), Assignment(np.array([0, 1, 0]), np.array([0, 0, 1]), 2))
    others = [
        base,
        (4, base[1], base[2]),
        (3, (5, 7, 6), base[2]),
        (3, base[1], replace(base[2], replica=np.array([0, 1, 1]))),
        (3, base[1], replace(base[2], row=np.array([0, 0, 0]))),
        (3, base[1], replace(base[2], row=None)),
        (3, base[1], replace(base[2], num_rows=3)),
    ]
    assert len({assignment_digest(*other) for other in others}) == len(others)
    assert all(len(assignment_digest(*other)) == 32 for other in others)
