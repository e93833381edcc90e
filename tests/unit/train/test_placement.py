"""The planner with a run's settings filled in: where images are encoded, and what the loads of each placement are."""

import pytest

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.timing import Coefficients, TimeModel
from megatron_keye.train.placement import Planner

SHAPES = [SampleShape(40 + 6 * n, (Segment(PatchGrid(1, 4, 6), 3),)) for n in range(6)]


def loads(tiny, placement):
    planner = Planner(tiny.config("parallel.tp=2", "parallel.pp=2", f"encode.placement={placement}"), num_replicas=1)
    return planner.loads(planner.place(range(6), SHAPES))


@pytest.mark.parametrize(("placement", "ranks"), [("all_ranks", 4), ("stage0", 2), ("stage0_replicated", 2)])
def test_loads_are_those_of_the_ranks_that_encode(tiny, placement, ranks):
    (vision,) = loads(tiny, placement).vision
    assert len(vision) == ranks
    assert all(vision)


def test_replicated_ranks_each_do_all_the_work(tiny):
    shared, replicated = (loads(tiny, placement).vision[0] for placement in ("stage0", "stage0_replicated"))
    assert set(replicated) == {sum(shared)}


FEW = Coefficients(1000, 0, 0, 0)
DEAR_SEGMENTS = TimeModel(FEW, Coefficients(0, 0, 10**9, 0), Coefficients(2000, 0, 10**8, 0), FEW)
"""Times in which the number of documents and images is nearly all that counts: nothing like FLOPs."""


@pytest.mark.parametrize("batches", [1, 3])
def test_measured_times_change_where_samples_go_and_never_which_a_step_holds(tiny, batches):
    config = tiny.config(f"data.lookahead.batches={batches}", "data.lookahead.canonical_replicas=2")
    data = tiny.dataset(config).plan_data
    by_flops, by_times = (Planner(config, 2, times).over(data) for times in (None, DEAR_SEGMENTS))
    one, other, moved = Cursor(), Cursor(), 0
    for _ in range(12):
        (plan, one), (timed, other) = by_flops(one), by_times(other)
        assert timed.members == plan.members
        assert timed.positions == plan.positions
        moved += list(timed.replicas) != list(plan.replicas)
    assert other == one, "cursor and ledger as well"
    assert moved


def test_loads_are_in_the_costs_that_placement_goes_by(tiny):
    config = tiny.config("parallel.tp=2")
    planner = Planner(config, 1, DEAR_SEGMENTS)
    (replica,) = planner.place(range(6), SHAPES)
    loads = planner.loads([replica])
    # Two ranks share the images and both wait for the rows, so time in the decoder counts twice.
    tokens = sum(document.padded_tokens for row in replica.rows for document in row.documents)
    assert loads.decoder == (2 * (2000 * tokens + 6 * 10**8),)
    assert sum(loads.vision[0]) == 6 * (24 * 1000 + 10**9)
    assert planner.predicted_s(replica, 0)[0] == pytest.approx(loads.vision[0][0] * 1e-12)
    assert planner.predicted_s(replica, 0)[1] == pytest.approx(loads.decoder[0] / 2 * 1e-12)
    assert Planner(config, 1).predicted_s(replica, 0) == (0.0, 0.0)
