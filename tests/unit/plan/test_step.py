"""Step plans hold their promises for any data, batch and layout, and go on exactly from any cursor."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.errors import PlanError
from megatron_keye.plan.blocks import shuffled
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.digest import LEDGER_START, ledger_digest, plan_table, table_digest
from megatron_keye.plan.lookahead import Lookahead
from megatron_keye.plan.step import PlanData, PlanSettings, StepPlanner, predicted_loads, replicate_tasks

COST = CostModel(decoder_token=1000, decoder_pair=3, vision_patch=400, vision_pair=2, projector_token=50)
SETTINGS = PlanSettings(
    seed=1,
    global_batch_samples=16,
    seq_length_tokens=512,
    pad_multiple_tokens=8,
    patches_per_round=256,
    num_replicas=2,
    encoders=(0, 1, 2, 3),
    microbatch_multiple=1,
    cost=COST,
)


def plan_step(shapes, cursor, config):
    return StepPlanner(PlanData.of(shapes), config).plan(cursor)


def sample_shape(text_tokens, grids):
    segments = tuple(Segment(grid, gap_tokens=3) for grid in grids)
    return SampleShape(text_tokens + sum(3 + s.grid.num_tokens for s in segments), segments)


grids = st.builds(PatchGrid, st.integers(1, 3), st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 16]))
datasets = st.lists(st.builds(sample_shape, st.integers(0, 80), st.lists(grids, max_size=4)), min_size=1, max_size=30)
plan_settings = st.builds(
    PlanSettings,
    seed=st.integers(0, 100),
    global_batch_samples=st.integers(1, 40),
    seq_length_tokens=st.integers(512, 900),
    pad_multiple_tokens=st.sampled_from([1, 2, 8, 12, 64]),
    patches_per_round=st.integers(1, 500),
    num_replicas=st.integers(1, 6),
    encoders=st.sets(st.integers(0, 7), min_size=1).map(lambda ranks: tuple(sorted(ranks))),
    microbatch_multiple=st.integers(1, 4),
    cost=st.just(COST),
    barrier=st.sampled_from(["step", "phase", "microbatch"]),
)


@settings(max_examples=200, deadline=None)
@given(datasets, plan_settings, st.integers(0, 200))
def test_plan_keeps_every_promise(shapes, config, position):
    plan, after = plan_step(shapes, Cursor(4, position), config)
    check_membership(plan, after, shapes, config, position)
    check_rows(plan, shapes, config)
    for replica in plan.replicas:
        check_encoding(replica, config)


def taken(start, end, shapes, config):
    return tuple(shuffled(len(shapes), config.seed)(np.arange(start, end)).tolist())


def check_membership(plan, after, shapes, config, position):
    assert plan.step == 4
    assert (after.step, after.position) == (5, position + config.global_batch_samples)
    assert plan.members == taken(position, position + config.global_batch_samples, shapes, config)
    placed = [d.sample for replica in plan.replicas for row in replica.rows for d in row.documents]
    assert sorted(placed) == sorted(plan.members)
    assert after.ledger == ledger_digest(LEDGER_START, plan.members)


def check_rows(plan, shapes, config):
    assert len(plan.replicas) == config.num_replicas
    num_rows = {len(replica.rows) for replica in plan.replicas}
    assert len(num_rows) == 1
    assert min(num_rows) >= 1
    assert min(num_rows) % config.microbatch_multiple == 0
    for row in (row for replica in plan.replicas for row in replica.rows):
        assert 0 < row.num_tokens <= config.seq_length_tokens
        assert row.num_tokens % config.pad_multiple_tokens == 0
        assert row.documents or row.num_tokens == config.pad_multiple_tokens
        end = 0
        for document in row.documents:
            assert document.shape == shapes[document.sample]
            assert document.start == end
            assert document.padded_tokens % config.pad_multiple_tokens == 0
            assert 0 <= document.padded_tokens - document.shape.num_tokens <= config.pad_multiple_tokens
            end += document.padded_tokens
        assert end in (row.num_tokens, 0)


def check_encoding(replica, config):
    assert sorted((t.microbatch, t.document, t.segment) for t in replica.tasks) == [
        (m, d, s) for m, row in enumerate(replica.rows) for d, doc in enumerate(row.documents) for s in range(len(doc.shape.segments))
    ]
    assert list(replica.tasks) == sorted(replica.tasks, key=lambda t: (t.encoder, t.round, t.microbatch, t.document, t.segment))
    rounds = {}
    for t in replica.tasks:
        grid = replica.rows[t.microbatch].documents[t.document].shape.segments[t.segment].grid
        rounds.setdefault((t.encoder, t.round), []).append(grid.num_patches)
    assert all(len(patches) == 1 or sum(patches) <= config.patches_per_round for patches in rounds.values())
    assert {encoder for encoder, _ in rounds} <= set(config.encoders)
    counts = [sum(1 for e, _ in rounds if e == encoder) for encoder in config.encoders]
    assert replica.num_rounds == max(counts)
    assert set(rounds) == {(e, r) for e, count in zip(config.encoders, counts, strict=True) for r in range(count)}


@settings(deadline=None)
@given(datasets, plan_settings, plan_settings)
def test_no_setting_of_placement_changes_membership(shapes, config, other):
    other = replace(other, seed=config.seed, global_batch_samples=config.global_batch_samples, cost=replace(COST, vision_pair=999))
    plan, after = plan_step(shapes, Cursor(), config)
    moved, after_moved = plan_step(shapes, Cursor(), other)
    assert (plan.members, after) == (moved.members, after_moved)


@settings(deadline=None)
@given(datasets, plan_settings)
def test_plans_are_the_same_every_time(shapes, config):
    first, again = (plan_step(list(shapes), Cursor(), replace(config))[0] for _ in range(2))
    assert table_digest(plan_table(first)) == table_digest(plan_table(again))
    assert tuple(first.replicas) == tuple(again.replicas)


def random_dataset(count, seed=0, text_tokens=200):
    """Skewed, as real mixtures are: many short texts, some pictures, few long videos."""
    rng = random.Random(seed)
    shapes = []
    for _ in range(count):
        kind = rng.random()
        num_segments = 0 if kind < 0.4 else 1 if kind < 0.8 else rng.randint(2, 20)
        side = 2 * rng.randint(1, 4 if num_segments > 1 else 16)
        segments = [PatchGrid(1, side, 2 * rng.randint(1, 6)) for _ in range(num_segments)]
        shapes.append(sample_shape(min(400, 1 + int(rng.expovariate(1 / text_tokens))) if num_segments < 2 else 20, segments))
    return shapes


def run_steps(shapes, cursor, config, count):
    plans = []
    for _ in range(count):
        plan, cursor = plan_step(shapes, cursor, config)
        plans.append(plan)
    return plans, cursor


def contents(plans):
    """All of these plans, to be compared."""
    return [(plan_table(plan).tolist(), tuple(plan.replicas)) for plan in plans]


def test_every_cursor_resumes_to_the_same_steps():
    shapes = random_dataset(50)
    undisturbed, end = run_steps(shapes, Cursor(), SETTINGS, 10)
    cursor = Cursor()
    for done in range(10):
        rest, resumed_end = run_steps(shapes, cursor, SETTINGS, 10 - done)
        assert contents(rest) == contents(undisturbed[done:])
        assert resumed_end == end
        _, cursor = plan_step(shapes, cursor, SETTINGS)


AHEAD = replace(SETTINGS, lookahead=Lookahead(4, canonical_replicas=4, growth_percent=200, cost=COST))


def test_every_cursor_in_every_window_resumes_to_the_same_steps():
    shapes = random_dataset(50)
    undisturbed, end = run_steps(shapes, Cursor(), AHEAD, 10)
    assert contents(undisturbed) != contents(run_steps(shapes, Cursor(), SETTINGS, 10)[0])
    cursor = Cursor()
    for done in range(10):
        rest, resumed_end = run_steps(shapes, cursor, AHEAD, 10 - done)
        assert contents(rest) == contents(undisturbed[done:])
        assert resumed_end == end
        _, cursor = plan_step(shapes, cursor, AHEAD)


def test_a_planner_that_is_kept_plans_the_same_steps():
    shapes = random_dataset(50)
    undisturbed, _ = run_steps(shapes, Cursor(), AHEAD, 10)
    planner, cursor = StepPlanner(PlanData.of(shapes), AHEAD), Cursor()
    for expected in undisturbed:
        plan, cursor = planner.plan(cursor)
        assert contents([plan]) == contents([expected])


@settings(deadline=None, max_examples=50)
@given(datasets, plan_settings, st.integers(1, 4), st.integers(1, 5))
def test_windows_visit_every_position_once_at_any_layout(shapes, config, batches, canonical_replicas):
    config = replace(config, lookahead=Lookahead(batches, canonical_replicas, 150, COST))
    elsewhere = {"num_replicas": 3, "encoders": (0, 5), "barrier": "microbatch", "speeds": ((900,) * 6,) * 3}
    other = replace(config, cost=replace(COST, vision_pair=9), **elsewhere)
    plans, cursor = run_steps(shapes, Cursor(), config, batches)
    moved, moved_cursor = run_steps(shapes, Cursor(), other, batches)
    assert [plan.members for plan in plans] == [plan.members for plan in moved]
    assert cursor == moved_cursor
    visited = [sample for plan in plans for sample in plan.members]
    assert sorted(visited) == sorted(taken(0, batches * config.global_batch_samples, shapes, config))
    assert cursor.stretches == ()


def test_changed_batch_and_lookahead_use_every_sample_once_an_epoch():
    shapes, cursor, visited = random_dataset(400), Cursor(), []
    for batch, lookahead in [(16, AHEAD.lookahead), (24, Lookahead()), (8, Lookahead(8, 2, 120, COST)), (16, AHEAD.lookahead)]:
        plans, cursor = run_steps(shapes, cursor, replace(SETTINGS, global_batch_samples=batch, lookahead=lookahead), 3)
        visited += [sample for plan in plans for sample in plan.members]
    while cursor.stretches:
        plan, cursor = plan_step(shapes, cursor, AHEAD)
        visited += plan.members
    assert sorted(visited) == sorted(taken(0, cursor.position, shapes, SETTINGS))


def test_resuming_at_other_layouts_goes_on_with_the_same_samples():
    shapes = random_dataset(50)
    undisturbed, end = run_steps(shapes, Cursor(), SETTINGS, 12)
    cursor, members = Cursor(), []
    for num_replicas, encoders in [(1, (0,)), (5, (0, 1)), (2, (2,)), (3, tuple(range(8)))]:
        plans, cursor = run_steps(shapes, cursor, replace(SETTINGS, num_replicas=num_replicas, encoders=encoders), 3)
        members += [plan.members for plan in plans]
    assert members == [plan.members for plan in undisturbed]
    assert cursor == end


def test_each_epoch_visits_every_sample_once():
    plans, _ = run_steps(random_dataset(48), Cursor(), SETTINGS, 6)
    visited = [sample for plan in plans for sample in plan.members]
    assert sorted(visited[:48]) == sorted(visited[48:]) == list(range(48))
    assert visited[:48] != visited[48:]


def test_balance_is_near_perfect_where_it_can_be():
    config = replace(SETTINGS, global_batch_samples=256, num_replicas=4, barrier="phase")
    plan, _ = plan_step(random_dataset(1000), Cursor(), config)
    loads = predicted_loads(plan.replicas, config)
    assert loads.decoder_imbalance < 1.03
    assert loads.vision_imbalance < 1.05


def test_predicted_loads_count_padding_and_segments():
    shapes = [sample_shape(5, []), sample_shape(10, [PatchGrid(1, 4, 4), PatchGrid(1, 2, 2)])]
    config = replace(SETTINGS, global_batch_samples=2, num_replicas=1, encoders=(0, 3), microbatch_multiple=3)
    plan, _ = plan_step(shapes, Cursor(), config)
    loads = predicted_loads(plan.replicas, config)
    padded_lengths = [8, 24, 8]  # 5, then 10 + 3 + 4 + 3 + 1 = 21, then an empty row
    assert loads.decoder == (sum(1000 * n + 3 * n * (n + 1) // 2 for n in padded_lengths),)
    assert loads.vision == ((16 * 400 + 2 * 256 + 4 * 50, 4 * 400 + 2 * 16 + 50),)


def test_replicated_tasks_give_every_encoder_all_segments():
    single = replace(SETTINGS, encoders=(0,))
    plan, _ = plan_step(random_dataset(50), Cursor(), single)
    replica = replicate_tasks(plan.replicas[0], (2, 0, 1))
    assert replica.num_rounds == plan.replicas[0].num_rounds
    assert replica.rows == plan.replicas[0].rows
    for encoder in (0, 1, 2):
        assert tuple(replace(t, encoder=0) for t in replica.tasks if t.encoder == encoder) == plan.replicas[0].tasks
    assert [t.encoder for t in replica.tasks] == sorted(t.encoder for t in replica.tasks)
    loads = predicted_loads([replica], replace(SETTINGS, encoders=(0, 1, 2)))
    assert len(set(loads.vision[0])) == 1
    assert loads.vision_imbalance == 1.0


def test_shared_tasks_cannot_be_replicated():
    plan, _ = plan_step(random_dataset(50), Cursor(), SETTINGS)
    with pytest.raises(PlanError, match="single encoder"):
        replicate_tasks(plan.replicas[0], (0, 1))


def test_a_sample_longer_than_a_row_is_named():
    with pytest.raises(PlanError, match=r"Sample 0 has 505 tokens, 512 with padding .* a row holds 511"):
        plan_step([SampleShape(505)], Cursor(), replace(SETTINGS, seq_length_tokens=511))


def test_an_empty_dataset_is_refused():
    with pytest.raises(PlanError, match=r"data\.train"):
        plan_step([], Cursor(), SETTINGS)


@pytest.mark.parametrize(
    "change",
    [
        {"global_batch_samples": 0},
        {"pad_multiple_tokens": 0},
        {"patches_per_round": 0},
        {"num_replicas": 0},
        {"microbatch_multiple": 0},
        {"seq_length_tokens": 7},
        {"encoders": ()},
        {"encoders": (1, 1)},
        {"speeds": ((1000,) * 4,)},
        {"speeds": ((1000,) * 4, (1000, 0, 1, 1))},
    ],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(PlanError, match=next(iter(change))):
        replace(SETTINGS, **change)
