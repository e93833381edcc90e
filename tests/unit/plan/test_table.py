"""Costs of many samples at once are those of each alone, and every replica can be planned alone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.errors import PlanError
from megatron_keye.plan.assignment import AssignmentRules, assign_samples
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.step import PlanSettings, place_members, replica_plan
from megatron_keye.plan.table import SampleTable

COST = CostModel(
    decoder_token=1000, decoder_pair=3, vision_patch=400, vision_pair=2, projector_token=50, decoder_document=70, vision_segment=90
)
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
    for number, sample in enumerate(samples.tolist()):
        shape = shapes[sample]
        tokens = max(8, -(-shape.num_tokens // 8) * 8)
        padded = COST.sample_cost(shape, tokens)
        assert tuple(column[number] for column in together) == (tokens, shape.num_patches, padded.decoder, padded.vision)
    assert table.window_costs(samples, COST).tolist() == [sum(COST.sample_cost(shapes[sample])) for sample in samples.tolist()]


@settings(deadline=None)
@given(shape_lists, shape_lists, st.data())
def test_tables_are_put_together_and_changed_as_the_lists_of_shapes_are(first, second, data):
    numbers = data.draw(st.lists(st.integers(0, len(first) + len(second) - 1), max_size=10, unique=True))
    together = [*first, *second]
    changed = [SampleShape(shape.num_tokens + 1, shape.segments[:2]) for shape in (together[number] for number in numbers)]
    table = SampleTable.concatenated([SampleTable.of(first), SampleTable.of(second)]).with_samples(np.array(numbers, np.int64), changed)
    for number, shape in zip(numbers, changed, strict=True):
        together[number] = shape
    taken = np.array(data.draw(st.permutations(range(len(together)))), np.int64)
    everywhere = np.arange(len(together))
    ours, expected = table.taking(taken), SampleTable.of([together[number] for number in taken.tolist()])
    for own, other in zip(ours.step_costs(everywhere, COST, 8, 640), expected.step_costs(everywhere, COST, 8, 640), strict=True):
        assert own.tolist() == other.tolist()


def test_frames_of_one_size_are_one_run():
    frames = (Segment(PatchGrid(1, 4, 4), 2),) * 100 + (Segment(PatchGrid(1, 2, 8), 2),) * 50 + (Segment(PatchGrid(1, 2, 2), 2),)
    table = SampleTable.of([SampleShape(5), SampleShape(1000, frames)])
    assert (table.first_run.tolist(), table.num_runs.tolist()) == ([0, 0], [0, 2])
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
    whole = tuple(place_members(members, shapes, config))
    assert tuple(replica_plan(members, shapes, assignment, replica, config) for replica in range(4)) == whole
