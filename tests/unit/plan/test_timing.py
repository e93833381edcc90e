"""The time model: what it counts as work, and what it finds in noisy times of known coefficients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.errors import PlanError
from megatron_keye.plan.balance import place_segments
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.timing import (
    NO_TIME,
    Coefficients,
    TimeModel,
    Work,
    _non_negative_least_squares,
    fit,
    pipeline_rows,
    row_work,
    vision_work,
)
from megatron_keye.plan.types import Document, ReplicaPlan, Row

IMAGE, CLIP = SampleShape(20, (Segment(PatchGrid(1, 4, 6), 3),)), SampleShape(40, (Segment(PatchGrid(1, 4, 4), 3),) * 4)
COST = CostModel(1, 0, 1, 0, 0)


def replica(encoders, patches_per_round=32):
    rows = (Row((Document(0, IMAGE, 0, 32), Document(1, CLIP, 32, 48)), 80), Row((), 16))
    tasks = place_segments(rows, encoders, patches_per_round, COST)
    return ReplicaPlan(rows, tasks, 1 + max(task.round for task in tasks))


def test_work_of_rows_counts_causal_pairs_with_padding():
    rows = replica((0,)).rows
    assert row_work(rows[0]) == Work(80, 32 * 33 // 2 + 48 * 49 // 2, 2, 1)
    assert row_work(rows[1]) == Work(16, 16 * 17 // 2, 1, 1)


@pytest.mark.parametrize("encoders", [(0,), (0, 1), (0, 1, 2, 3)])
def test_work_of_ranks_adds_up_to_that_of_all_segments(encoders):
    plan = replica(encoders)
    works = [vision_work(plan, encoder) for encoder in encoders]
    assert [sum(work[i] for work in works) for i in range(3)] == [24 + 4 * 16, 24**2 + 4 * 16**2, 5]
    assert vision_work(plan, 7) == Work(0, 0, 0, 0)


def test_rounds_are_the_vit_s_sequences():
    assert vision_work(replica((0,), patches_per_round=32), 0).sequences == 3
    assert vision_work(replica((0,), patches_per_round=1000), 0).sequences == 1


PART = Coefficients(1000, 7, 500, 90_000)
MODEL = TimeModel(PART, Coefficients(2000, 0, 0, 0), Coefficients(900, 8, 40, 6000), Coefficients(300, 3, 40, 5000))


def test_predictions_are_sums_over_the_parts():
    plan = replica((0, 1))
    work = vision_work(plan, 1)
    assert MODEL.encode_ps(plan, 1) == 3000 * work.tokens + 7 * work.pairs + 500 * work.items + 90_000 * work.sequences
    rows = [900 * 80 + 8 * row_work(plan.rows[0]).pairs + 80 + 6000, 900 * 16 + 8 * 136 + 40 + 6000]
    assert MODEL.decode_ps(plan, stages=1, chunks=1) == sum(rows)
    assert MODEL.decode_ps(plan, stages=3, chunks=2) == sum(rows) + max(rows)


def test_equal_rows_of_a_pipeline_take_as_long_as_so_many_rows():
    rows = replica((0,)).rows[:1] * 4
    plan = ReplicaPlan(rows, (), 0)
    assert MODEL.decode_ps(plan, 3, 2) == pipeline_rows(4, 3, 2) * MODEL.decoder.time_ps(row_work(rows[0]))


def test_costs_are_in_time_of_all_ranks_of_a_replica():
    """A replica's ranks share its images but all wait for its rows: only so may the two be added."""
    cost = MODEL.cost_model(num_encoders=4)
    assert cost.decoder_cost(10) == 4 * MODEL.decoder.time_ps(Work(10, 55, 1, 0))
    assert cost.vision_cost(PatchGrid(1, 2, 4)) == MODEL.vision.time_ps(Work(8, 64, 1, 0))
    assert MODEL.cost_model(1).decoder_cost(10) * 4 == cost.decoder_cost(10)


works = st.tuples(st.integers(1, 24), st.sampled_from([16, 64, 256, 1000, 4096]), st.integers(1, 4)).map(
    lambda t: Work(t[0] * t[1], t[0] * t[1] * t[1], t[0], t[2])
)
work_lists = st.lists(works, min_size=24, max_size=40)
coefficients = st.builds(Coefficients, st.integers(10_000, 10**7), st.integers(0, 10**4), st.integers(0, 10**9), st.integers(0, 10**10))


@settings(max_examples=30)
@given(work_lists, coefficients)
def test_exact_times_are_reproduced(works, truth):
    found = fit(works, [truth.time_ps(work) * 1e-12 for work in works])
    assert found.errors.max() < 1e-3


@settings(max_examples=30)
@given(work_lists, coefficients, st.integers(0, 2**32 - 1))
def test_known_coefficients_are_recovered_under_noise(works, truth, seed):
    """5 % of noise on each time; where a term matters, its coefficient is found, and so are times of work that was not measured."""
    grid = [Work(k * n, k * n * n, k, s) for k in (1, 5, 20) for n in (16, 128, 1024, 4096) for s in (1, 4)]
    measured = [*grid, *works]
    noise = np.random.default_rng(seed).normal(0.0, 0.05, len(measured))
    found = fit(measured, [truth.time_ps(work) * 1e-12 * np.exp(e) for work, e in zip(measured, noise, strict=True)]).coefficients
    unseen = [Work(k * n, k * n * n, k, 2) for k in (2, 9) for n in (40, 600, 3000)]
    for work in unseen:
        assert found.time_ps(work) == pytest.approx(truth.time_ps(work), rel=0.12)
    for name, column in (("token_ps", 0), ("pair_ps", 1), ("sequence_ps", 3)):
        share = max(getattr(truth, name) * work[column] / truth.time_ps(work) for work in grid)
        if share > 0.9:
            assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.2)


@settings(max_examples=50)
@given(st.lists(st.tuples(works, st.floats(1e-6, 1e3)), min_size=1, max_size=12))
def test_coefficients_are_never_negative_and_whole(points):
    found = fit([work for work, _ in points], [seconds for _, seconds in points]).coefficients
    for value in (found.token_ps, found.pair_ps, found.item_ps, found.sequence_ps):
        assert type(value) is int and value >= 0


@settings(max_examples=20)
@given(work_lists, st.integers(0, 2**32 - 1))
def test_no_other_coefficients_nearby_have_a_smaller_error(works, seed):
    """The squared error of logarithms at 200 random points around the answer, near and far."""
    rng = np.random.default_rng(seed)
    times_ps = 1e4 * np.array([PART.time_ps(work) for work in works]) * np.exp(rng.normal(0.0, 0.3, len(works)))
    features = np.array(works, float)

    def error(values):
        return np.square(np.log(features @ values / times_ps)).sum()

    found = fit(works, times_ps * 1e-12).coefficients
    ours = np.array([found.token_ps, found.pair_ps, found.item_ps, found.sequence_ps], float)
    reach = times_ps.max() / features.max(axis=0)
    for _ in range(200):
        other = np.maximum(ours + reach * rng.normal(0.0, 10.0 ** rng.uniform(-5, 0), 4) * rng.integers(0, 2, 4), 0.0)
        if other.any():
            assert error(ours) <= error(other) * (1 + 1e-3) + 1e-6


@given(st.integers(0, 2**32 - 1), st.integers(4, 30))
def test_least_squares_meet_the_conditions_of_an_optimum(seed, rows):
    """Kuhn and Tucker: no slope where a value is positive, and none downwards where it is 0. The problem is convex."""
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(rows, 4)), rng.normal(size=rows)
    found = _non_negative_least_squares(matrix, target)
    slope = matrix.T @ (matrix @ found - target)
    assert (found >= 0).all()
    assert (slope > -1e-8).all()
    assert np.abs(slope[found > 0]).max(initial=0.0) < 1e-8


@pytest.mark.parametrize(
    ("works", "seconds"), [([], []), ([Work(0, 0, 0, 0)], [1.0]), ([Work(1, 1, 1, 1)], [0.0]), ([Work(1, 1, 1, 1)], [float("nan")])]
)
def test_what_cannot_be_fitted_is_an_error(works, seconds):
    with pytest.raises(PlanError, match="cannot be fitted: expected at least one, each with work and a positive time"):
        fit(works, seconds)


def test_no_time_is_no_time():
    assert NO_TIME.time_ps(Work(10, 10, 10, 10)) == 0
