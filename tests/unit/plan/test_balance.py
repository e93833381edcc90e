"""Placement is complete, within Graham's bound, and better than dealing out in turn; rounds are bounded and few."""

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.plan.balance import cut_rounds, imbalance, place, place_segments, place_vectors
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.types import Document, Row

COST = CostModel(decoder_token=10, decoder_pair=1, vision_patch=20, vision_pair=1, projector_token=5)


def loads_of(costs, bins, num_bins):
    loads = [0] * num_bins
    for c, b in zip(costs, bins, strict=True):
        loads[b] += c
    return loads


def smallest_makespan(costs, num_bins):
    """By trying every assignment."""
    return min(max(loads_of(costs, bins, num_bins)) for bins in product(range(num_bins), repeat=len(costs)))


@pytest.mark.parametrize(("loads", "expected"), [([1, 1, 1], 1.0), ([3, 1], 1.5), ([0, 0], 1.0), ([7], 1.0), ([0, 0, 0, 4], 4.0)])
def test_imbalance_is_max_over_mean(loads, expected):
    assert imbalance(loads) == expected


@given(st.lists(st.integers(0, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_lpt_keeps_grahams_bound(costs, num_bins):
    largest = max(loads_of(costs, place(costs, num_bins), num_bins))
    # largest / optimum <= 4/3 - 1/(3 bins), in integers
    assert 3 * num_bins * largest <= (4 * num_bins - 1) * smallest_makespan(costs, num_bins)


@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=200), st.integers(1, 20))
def test_lpt_is_within_one_item_of_even(costs, num_bins):
    loads = loads_of(costs, place(costs, num_bins), num_bins)
    assert max(loads) - min(loads) <= max(costs)


def skewed_costs(count, seed, sigma=1.5):
    rng = random.Random(seed)
    return [int(1e6 * rng.lognormvariate(0, sigma)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_bins", [4, 16])
def test_lpt_beats_round_robin_on_skewed_loads(seed, num_bins):
    costs = skewed_costs(32 * num_bins, seed)
    planned = imbalance(loads_of(costs, place(costs, num_bins), num_bins))
    in_turn = imbalance(loads_of(costs, [i % num_bins for i in range(len(costs))], num_bins))
    lower_bound = max(1.0, max(costs) * num_bins / sum(costs))
    assert planned <= 1.01 * lower_bound
    assert planned < in_turn


@pytest.mark.parametrize("seed", range(10))
def test_every_kind_of_cost_is_even_at_once(seed):
    """Text-only, picture-heavy and mixed samples: one number per sample would leave one phase uneven."""
    num_bins = 8
    costs = []
    for decoder, vision, draw in zip(skewed_costs(512, seed, 1), skewed_costs(512, seed + 100, 1), skewed_costs(512, 7, 1), strict=True):
        costs.append((decoder, 0 if draw < 800_000 else 3 * vision, decoder // 7 + vision // 9))
    bins = place_vectors(costs, num_bins)
    for kind in zip(*costs, strict=True):
        planned = imbalance(loads_of(kind, bins, num_bins))
        in_turn = imbalance(loads_of(kind, [i % num_bins for i in range(512)], num_bins))
        assert planned < 1.04 < 1.05 < in_turn


@given(st.lists(st.tuples(*[st.integers(0, 10**18)] * 3), min_size=1, max_size=30), st.integers(1, 8))
def test_vectors_all_get_a_bin(costs, num_bins):
    bins = place_vectors(costs, num_bins)
    assert len(bins) == len(costs)
    assert set(bins) <= set(range(num_bins))
    assert bins == place_vectors(costs, num_bins)


def test_equal_vectors_are_spread_evenly():
    bins = place_vectors([(5, 0, 1)] * 12, 4)
    assert sorted(bins) == sorted([0, 1, 2, 3] * 3)
    assert place_vectors([(7, 0, 1)], 3) == [0]


def test_one_item_may_be_all_of_its_kind():
    """The largest load that there can be is still compared rightly."""
    assert place_vectors([(8, 0), (0, 4), (0, 4)], 2) == [0, 1, 1]


grids = st.builds(PatchGrid, st.just(1), st.sampled_from([2, 4, 8, 16]), st.sampled_from([2, 4, 6]))
documents = st.lists(st.lists(grids, max_size=5), max_size=4)


def rows_of(grids_by_row):
    rows = []
    for grids_by_document in grids_by_row:
        shapes = [SampleShape(64, tuple(Segment(grid, 1) for grid in grids)) for grids in grids_by_document]
        rows.append(Row(tuple(Document(i, shape, 64 * i, 64) for i, shape in enumerate(shapes)), 64 * max(1, len(shapes))))
    return rows


@given(st.lists(documents, max_size=4), st.sets(st.integers(0, 9), min_size=1).map(sorted), st.integers(1, 100))
def test_segments_are_encoded_once_in_bounded_rounds(grids_by_row, encoders, patches_per_round):
    rows = rows_of(grids_by_row)
    tasks = place_segments(rows, encoders, patches_per_round, COST)
    addresses = [(t.microbatch, t.document, t.segment) for t in tasks]
    assert sorted(addresses) == [
        (m, d, s) for m, row in enumerate(rows) for d, doc in enumerate(row.documents) for s in range(len(doc.shape.segments))
    ]
    assert list(tasks) == sorted(tasks, key=lambda t: (t.encoder, t.round, t.microbatch, t.document, t.segment))
    assert {t.encoder for t in tasks} <= set(encoders)
    by_round = {}
    for t in tasks:
        patches = rows[t.microbatch].documents[t.document].shape.segments[t.segment].grid.num_patches
        by_round.setdefault((t.encoder, t.round), []).append(patches)
    for patches in by_round.values():
        assert sum(patches) <= patches_per_round or len(patches) == 1
    for encoder in encoders:
        numbers = sorted(r for e, r in by_round if e == encoder)
        assert numbers == list(range(len(numbers)))


def test_segments_are_balanced_over_encoders():
    rng = random.Random(0)
    rows = rows_of([[[PatchGrid(1, 2 * rng.randint(1, 12), 2 * rng.randint(1, 12)) for _ in range(20)]] for _ in range(8)])
    loads = dict.fromkeys(range(4), 0)
    for t in place_segments(rows, range(4), 10_000, COST):
        loads[t.encoder] += COST.vision_cost(rows[t.microbatch].documents[t.document].shape.segments[t.segment].grid)
    assert imbalance(list(loads.values())) < 1.01


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 1000)), max_size=40))
def test_rounds_are_few_and_dearest_first(segments):
    patches, costs = [p for p, _ in segments], [c for _, c in segments]
    rounds = cut_rounds(patches, costs, 40)
    num_rounds = max(rounds, default=-1) + 1
    totals = loads_of(costs, rounds, num_rounds)
    assert totals == sorted(totals, reverse=True)
    # Two rounds that together fit one could have been one.
    filled = sorted(loads_of(patches, rounds, num_rounds))
    assert num_rounds < 2 or filled[0] + filled[1] > 40
