"""The spill evens out the ViT, moves little, moves nothing where it is even, and leaves samples where they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import spill_gain
from benchmarks.mixes import MIXES, draw
from benchmarks.spill import StepSegments, assign_with_spill, phase_time, spill_excess
from megatron_keye.plan.assignment import AssignmentRules, StepCosts
from megatron_keye.plan.spread import lower_bound, sum_by_bin


def segments_of(costs_by_sample):
    counts = [len(costs) for costs in costs_by_sample]
    costs = np.array([cost for costs in costs_by_sample for cost in costs], np.int64)
    return StepSegments(np.repeat(np.arange(len(counts)), counts), costs, costs // 10)


def skewed_step(count, seed):
    rng = np.random.default_rng(seed)
    segments = segments_of([rng.lognormal(10, 1.2, rng.integers(0, 8)).astype(np.int64) for _ in range(count)])
    vision = sum_by_bin(segments.slot, segments.cost, count)
    decoder = rng.lognormal(12, 1, count).astype(np.int64)
    return StepCosts(np.full(count, 10), vision // 10, decoder, vision), segments


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 1000), max_size=6), min_size=1, max_size=20), st.integers(1, 6), st.data())
def test_every_segment_is_encoded_by_one_replica(costs_by_sample, num_replicas, data):
    segments, count = segments_of(costs_by_sample), len(costs_by_sample)
    replica = np.array(data.draw(st.lists(st.integers(0, num_replicas - 1), min_size=count, max_size=count)))
    speeds = data.draw(st.lists(st.integers(500, 1500), min_size=num_replicas, max_size=num_replicas))
    rules = AssignmentRules(num_replicas, 100, speeds=tuple(speeds))
    spill = spill_excess(segments, replica, rules)
    assert spill.owner.tolist() == replica[segments.slot].tolist()
    assert len(spill.encoded_by) == len(segments.cost)
    assert set(spill.encoded_by.tolist()) <= set(range(num_replicas))
    assert spill_excess(segments, replica.copy(), rules).encoded_by.tolist() == spill.encoded_by.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_phases_are_near_their_bound_with_little_moved(seed):
    rules = AssignmentRules(16, 100, barrier="phase")
    costs, segments = skewed_step(16 * 16, seed)
    assignment, spill = assign_with_spill(costs, segments, rules)
    bound = lower_bound(costs.decoder, rules.slowness) + lower_bound(segments.cost, rules.slowness)
    assert phase_time(costs, segments, assignment, spill, rules) < 1.015 * bound
    assert spill.moved_share(segments.tokens) < 0.15


def test_what_is_even_stays():
    segments = segments_of([[5], [5], [3, 2], [1, 4]])
    spill = spill_excess(segments, np.arange(4), AssignmentRules(4, 100))
    assert spill.moved_share(segments.tokens) == 0
    assert (spill.owner == spill.encoded_by).all()


def test_all_images_on_one_replica_are_shared():
    segments = segments_of([[10] * 8, [], [], []])
    spill = spill_excess(segments, np.arange(4), AssignmentRules(4, 100))
    assert np.bincount(spill.encoded_by).tolist() == [2, 2, 2, 2]
    assert spill.moved_share(segments.tokens) == 0.75


def test_one_segment_too_large_stays_and_others_make_room():
    segments = segments_of([[100, 10, 10], [], []])
    spill = spill_excess(segments, np.zeros(3, np.int64), AssignmentRules(3, 100))
    assert spill.encoded_by[0] == 0
    assert sorted(spill.encoded_by[1:].tolist()) == [1, 2]


def test_slow_replicas_give_more_away():
    segments = segments_of([[1] * 300] * 3)
    rules = AssignmentRules(3, 100, speeds=(500, 1000, 1000))
    loads = np.bincount(spill_excess(segments, np.arange(3), rules).encoded_by)
    assert loads == pytest.approx([180, 360, 360], abs=3)


def test_steps_of_the_gain_hold_every_sample_once():
    samples = draw(MIXES[0], 8 * 4 * 2, seed=0)
    steps = list(spill_gain.steps_of(MIXES[0], 4, 2, seed=0))
    assert sorted(cost for step in steps for cost in step.total_ns.tolist()) == sorted((samples.decoder_ns + samples.vision_ns).tolist())
    for step in steps:
        owner = np.repeat(np.arange(8), np.diff(step.samples.first))
        assert np.bincount(owner, step.samples.segment_ns, 8).tolist() == step.samples.vision_ns.tolist()
    assert spill_gain.measure(MIXES[0], 4, 2, windows=1)["better"] <= 1
