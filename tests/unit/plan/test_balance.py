"""Every segment is encoded once, evenly over the encoders, in rounds that are bounded and few."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.plan.balance import cut_rounds, imbalance, place_segments
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.types import Document, Row

COST = CostModel(decoder_token=10, decoder_pair=1, vision_patch=20, vision_pair=1, projector_token=5)


def loads_of(costs, bins, num_bins):
    loads = [0] * num_bins
    for c, b in zip(costs, bins, strict=True):
        loads[b] += c
    return loads


@pytest.mark.parametrize(("loads", "expected"), [([1, 1, 1], 1.0), ([3, 1], 1.5), ([0, 0], 1.0), ([7], 1.0), ([0, 0, 0, 4], 4.0)])
def test_imbalance_is_max_over_mean(loads, expected):
    assert imbalance(loads) == expected


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
