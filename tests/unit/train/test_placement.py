"""The planner with a run's settings filled in: where images are encoded, and what the loads of each placement are."""

import pytest

from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
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
