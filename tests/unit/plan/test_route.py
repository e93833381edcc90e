"""Routes, by playing all ranks of a replica in numpy: every visual row reaches exactly its places, every gradient returns once."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.parallel.grid import RankGrid
from megatron_keye.plan import route
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.route import route_step
from megatron_keye.plan.step import PlanSettings, place_members, replicate_tasks

COST = CostModel(decoder_token=1000, decoder_pair=3, vision_patch=400, vision_pair=2, projector_token=50)
TEXT = -1
"""What an embedding of the simulation holds where there is no visual token; visual rows are numbered from 0."""


@st.composite
def sample_shapes(draw):
    segments = []
    for _ in range(draw(st.integers(0, 3))):
        grid = PatchGrid(draw(st.integers(1, 2)), draw(st.sampled_from([2, 4, 6])), draw(st.sampled_from([2, 8])))
        segments.append(Segment(grid, draw(st.integers(0, 7))))
    used = sum(s.gap_tokens + s.grid.num_tokens for s in segments)
    return SampleShape(used + draw(st.integers(0, 20)), tuple(segments))


grids = st.builds(RankGrid, tp=st.sampled_from([1, 2, 3, 4]), cp=st.sampled_from([1, 2, 3, 4]), pp=st.sampled_from([1, 2, 3]))
placements = st.sampled_from(["all_ranks", "stage0", "stage0_replicated", "last_rank"])


def plan_replica(shapes, grid, placement, patches_per_round):
    """A replica's plan by the real planner; `last_rank` is a lopsided choice that no setting offers."""
    encoders = {
        "all_ranks": tuple(range(grid.replica_size)),
        "stage0": grid.stage_ranks(0),
        "stage0_replicated": (0,),
        "last_rank": (grid.replica_size - 1,),
    }[placement]
    multiple = 2 * grid.cp * grid.tp
    plan_settings = PlanSettings(
        seed=0,
        global_batch_samples=len(shapes),
        seq_length_tokens=-(-300 // multiple) * multiple,
        pad_multiple_tokens=multiple,
        patches_per_round=patches_per_round,
        num_replicas=1,
        encoders=encoders,
        microbatch_multiple=1,
        cost=COST,
    )
    (replica,) = place_members(range(len(shapes)), shapes, plan_settings)
    return replicate_tasks(replica, grid.stage_ranks(0)) if placement == "stage0_replicated" else replica


def visual_rows(replica):
    """Per row of the plan, the number of the visual row at each token, TEXT elsewhere; numbers count on through the step."""
    numbered, number = [], 0
    for row in replica.rows:
        tokens = np.full(row.num_tokens, TEXT)
        for document in row.documents:
            for start, segment in zip(document.shape.visual_starts(), document.shape.segments, strict=True):
                at = document.start + start
                tokens[at : at + segment.grid.num_tokens] = np.arange(number, number + segment.grid.num_tokens)
                number += segment.grid.num_tokens
        numbered.append(tokens)
    return numbered, number


def encoder_outputs(replica, numbered, size):
    """[rank][round] -> the visual rows that the rank's encoder returns in that round, in its order."""
    outputs = [[[] for _ in range(replica.num_rounds)] for _ in range(size)]
    for task in replica.tasks:
        document = replica.rows[task.microbatch].documents[task.document]
        at = document.start + document.shape.visual_starts()[task.segment]
        count = document.shape.segments[task.segment].grid.num_tokens
        outputs[task.encoder][task.round] += numbered[task.microbatch][at : at + count].tolist()
    return [[np.array(rows, dtype=np.int64) for rows in rounds] for rounds in outputs]


def held_tokens(row_tokens, cu_seqlens, grid, sequence_parallel, replica_rank):
    """What one rank holds of a row, from the definition of zigzag: chunks r and 2 CP - 1 - r of each document, then a TP slice."""
    pieces = []
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        chunks = np.split(row_tokens[start:end], 2 * grid.cp)
        rank = grid.coordinate(replica_rank, "cp")
        # Without context parallelism both chunks are neighbours and the document is whole.
        pieces += [chunks[rank], chunks[2 * grid.cp - 1 - rank]]
    mine = np.concatenate(pieces)
    return np.split(mine, grid.tp)[grid.coordinate(replica_rank, "tp")] if sequence_parallel else mine


def all_to_all(sources, exchanges):
    """Rows that each rank receives; the wire carries counts and rows, nothing else."""
    for i, j in product(range(len(exchanges)), repeat=2):
        assert exchanges[i].send_counts[j] == exchanges[j].receive_counts[i]
    sent = [
        np.split(source[exchange.send_rows], np.cumsum(exchange.send_counts)[:-1])
        for source, exchange in zip(sources, exchanges, strict=True)
    ]
    return [np.concatenate([sent[i][j] for i in range(len(sent))]) for j in range(len(sent))]


def check_routes(replica, grid, sequence_parallel):
    """Everything that a step needs of its routes."""
    ranks = range(grid.replica_size)
    routes = [route_step(replica, grid, sequence_parallel, rank) for rank in ranks]
    numbered, num_visual = visual_rows(replica)
    outputs = encoder_outputs(replica, numbered, grid.replica_size)
    slabs = check_forward(replica, grid, sequence_parallel, routes, numbered, outputs)
    check_backward(routes, slabs, outputs, num_visual)


def check_forward(replica, grid, sequence_parallel, routes, numbered, outputs):
    slabs = [np.full(sum(r.slab_counts), TEXT) for r in routes]
    for number in range(replica.num_rounds):
        exchanges = [r.forward[number] for r in routes]
        received = all_to_all([rounds[number] for rounds in outputs], exchanges)
        for slab, rows, exchange in zip(slabs, received, exchanges, strict=True):
            assert (slab[exchange.receive_rows] == TEXT).all()
            assert len(set(exchange.receive_rows)) == len(exchange.receive_rows)
            slab[exchange.receive_rows] = rows
    for rank, slab in enumerate(slabs):
        if rank not in grid.stage_ranks(0):
            assert slab.size == 0
            continue
        parts = np.split(slab, np.cumsum(routes[rank].slab_counts)[:-1])
        for row, tokens, part, places in zip(replica.rows, numbered, parts, routes[rank].places, strict=True):
            expected = held_tokens(tokens, row.cu_seqlens, grid, sequence_parallel, rank)
            embedded = np.full(len(expected), TEXT)
            embedded[places] = part
            assert np.array_equal(embedded, expected), f"rank {rank} embeds other rows"
    return slabs


def check_backward(routes, slabs, outputs, num_visual):
    """A rank's gradient of visual row n is n + 1 here: complete on every rank that holds the row, as tensor parallelism makes it."""
    returned = np.zeros(num_visual)
    for number in range(len(routes[0].backward)):
        exchanges = [r.backward[number] for r in routes]
        received = all_to_all([slab + 1.0 for slab in slabs], exchanges)
        for rounds, rows, exchange in zip(outputs, received, exchanges, strict=True):
            np.add.at(returned, rounds[number][exchange.receive_rows], rows)
    assert np.array_equal(returned, np.arange(num_visual) + 1.0), "a gradient did not return exactly once"


@settings(max_examples=150, deadline=None)
@given(st.lists(sample_shapes(), min_size=1, max_size=8), grids, st.booleans(), placements, st.integers(1, 120))
def test_every_row_arrives_and_every_gradient_returns_once(shapes, grid, sequence_parallel, placement, patches_per_round):
    assume(not sequence_parallel or grid.tp > 1)
    replica = plan_replica(shapes, grid, placement, patches_per_round)
    check_routes(replica, grid, sequence_parallel)


SHAPES = (
    SampleShape(40, (Segment(PatchGrid(1, 4, 8), 3), Segment(PatchGrid(1, 2, 8), 5))),
    SampleShape(9),
    SampleShape(77, (Segment(PatchGrid(2, 6, 8), 11),)),
)
LAYOUTS = {
    "tp2": (RankGrid(tp=2), False),
    "tp2sp": (RankGrid(tp=2), True),
    "cp2": (RankGrid(cp=2), False),
    "tp2cp2pp2": (RankGrid(tp=2, cp=2, pp=2), False),
    "tp2cp2pp2sp": (RankGrid(tp=2, cp=2, pp=2), True),
}


@pytest.fixture
def alter_deliveries(monkeypatch):
    """Makes every rank plan with deliveries changed by a function: a mistake that all ranks agree on."""
    original = route._all_deliveries

    def alter(change):
        monkeypatch.setattr(route, "_all_deliveries", lambda *args: change(original(*args)))

    return alter


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_deleted_delivery_is_noticed(layout, alter_deliveries):
    grid, sequence_parallel = LAYOUTS[layout]
    replica = plan_replica(SHAPES, grid, "all_ranks", 60)
    check_routes(replica, grid, sequence_parallel)
    copies = grid.tp if not sequence_parallel else 1
    total = copies * sum(shape.num_visual_tokens for shape in SHAPES)
    for missing in range(total):
        alter_deliveries(lambda d, missing=missing: d.where(np.arange(len(d.row)) != missing))
        with pytest.raises(AssertionError):
            check_routes(replica, grid, sequence_parallel)


@pytest.mark.parametrize("layout", ["tp2", "tp2cp2pp2"])
def test_a_gradient_from_two_tensor_parallel_ranks_is_noticed(layout, alter_deliveries):
    grid, sequence_parallel = LAYOUTS[layout]
    replica = plan_replica(SHAPES, grid, "all_ranks", 60)
    alter_deliveries(lambda d: replace(d, returns=np.ones_like(d.returns)))
    with pytest.raises(AssertionError, match="exactly once"):
        check_routes(replica, grid, sequence_parallel)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_deleted_entry_of_one_exchange_is_noticed(layout):
    """One rank alone forgets an entry: the ranks then disagree about what is on the wire."""
    grid, sequence_parallel = LAYOUTS[layout]
    replica = plan_replica(SHAPES, grid, "all_ranks", 60)
    routes = [route_step(replica, grid, sequence_parallel, rank) for rank in range(grid.replica_size)]
    numbered, _ = visual_rows(replica)
    outputs = encoder_outputs(replica, numbered, grid.replica_size)
    first = routes[0].forward[0]
    to = next(rank for rank, count in enumerate(first.send_counts) if count)
    counts = tuple(count - (rank == to) for rank, count in enumerate(first.send_counts))
    routes[0] = replace(routes[0], forward=(replace(first, send_rows=first.send_rows[1:], send_counts=counts), *routes[0].forward[1:]))
    with pytest.raises(AssertionError):
        check_forward(replica, grid, sequence_parallel, routes, numbered, outputs)


def test_a_step_without_images_has_exchanges_without_rows():
    grid = RankGrid(tp=2, pp=2)
    replica = plan_replica((SampleShape(20), SampleShape(31)), grid, "all_ranks", 60)
    for rank in range(grid.replica_size):
        mine = route_step(replica, grid, False, rank)
        assert mine.forward == mine.backward == ()
        assert mine.slab_counts == (0,) * len(replica.rows)
        assert [places.size for places in mine.places] == [0] * len(replica.rows)
