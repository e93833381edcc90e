"""The rank grid: arithmetic that every group, route and plan stands on."""

from itertools import combinations, product

import pytest

from megatron_keye.parallel.grid import AXES, RankGrid

GRIDS = [RankGrid(*sizes) for sizes in product((1, 2, 3), (1, 2), (1, 2, 4), (1, 2, 3))]
AXIS_SETS = [axes for count in range(1, len(AXES) + 1) for axes in combinations(AXES, count)]


@pytest.mark.parametrize("axes", AXIS_SETS, ids="-".join)
def test_groups_partition_the_world(axes):
    for grid in GRIDS:
        groups = grid.groups(*axes)
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
        for group in groups:
            assert group == sorted(group)
            for axis in AXES:
                places = {grid.coordinate(rank, axis) for rank in group}
                assert len(places) == (grid.size(axis) if axis in axes else 1)


@pytest.mark.parametrize("axes", AXIS_SETS, ids="-".join)
def test_groups_are_those_of_megatron(axes):
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    for grid in GRIDS:
        theirs = parallel_state.RankGenerator(tp=grid.tp, ep=1, dp=grid.dp, pp=grid.pp, cp=grid.cp, order="tp-cp-pp-dp")
        assert sorted(grid.groups(*axes)) == sorted(theirs.get_ranks("-".join(axes)))


def test_coordinates_and_ranks_are_inverse():
    for grid in GRIDS:
        for rank in range(grid.world_size):
            assert grid.rank(**{axis: grid.coordinate(rank, axis) for axis in AXES}) == rank


def test_ranks_of_a_replica_are_neighbours_and_stages_follow_one_another():
    for grid in GRIDS:
        ranks = list(range(grid.world_size))
        assert [grid.replica(rank) for rank in ranks] == sorted(list(range(grid.dp)) * grid.replica_size)
        assert grid.groups("tp", "cp", "pp") == [ranks[start : start + grid.replica_size] for start in ranks[:: grid.replica_size]]
        places = [place for stage in range(grid.pp) for place in grid.stage_ranks(stage)]
        assert places == list(range(grid.replica_size))
        for rank in ranks:
            assert grid.replica(rank) == grid.coordinate(rank, "dp")
            assert grid.replica_rank(rank) in grid.stage_ranks(grid.coordinate(rank, "pp"))


def test_unknown_axes_are_refused():
    with pytest.raises(KeyError, match="ep"):
        RankGrid(tp=2).groups("tp", "ep")
    with pytest.raises(KeyError):
        RankGrid(tp=2).coordinate(0, "ep")
