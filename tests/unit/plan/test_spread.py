"""Spreading is complete, close to the lower bound, the same on every host and with or without numba, and mindful of limits and speeds."""

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.plan import kernels
from megatron_keye.plan.balance import imbalance
from megatron_keye.plan.spread import common_scale, exact_sum, improve, lower_bound, slowness_of, spread, sum_by_bin


def int64(values):
    return np.array(values, np.int64)


def loads_of(costs, bins, num_bins):
    return sum_by_bin(bins, int64(costs), num_bins).tolist()


def smallest_makespan(costs, num_bins):
    """By trying every assignment."""
    return min(max(loads_of(costs, int64(bins), num_bins)) for bins in product(range(num_bins), repeat=len(costs)))


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_one_kind_keeps_grahams_bound(costs, num_bins):
    """Largest first is within 4/3 - 1/(3 bins) of the optimum (R. L. Graham, 1969)."""
    largest = max(loads_of(costs, spread([int64(costs)], num_bins), num_bins))
    assert 3 * num_bins * largest <= (4 * num_bins - 1) * smallest_makespan(costs, num_bins)


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**15), max_size=200), st.integers(1, 20))
def test_no_bin_is_more_than_one_item_above_the_mean(costs, num_bins):
    loads = loads_of(costs, spread([int64(costs)], num_bins), num_bins)
    scale = max(1, sum(costs) >> 27)  # costs are cut to 28 bits of the total before they are compared
    assert max(loads) <= sum(costs) / num_bins + max(costs, default=0) + 2 * scale * (1 + len(costs))


def skewed_costs(count, seed, sigma=1.5):
    rng = random.Random(seed)
    return int64([int(1e6 * rng.lognormvariate(0, sigma)) for _ in range(count)])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_bins", [4, 16, 64])
def test_one_kind_is_within_half_a_percent_of_the_bound(seed, num_bins):
    costs = skewed_costs(32 * num_bins, seed)
    latest = max(loads_of(costs, spread([costs], num_bins), num_bins))
    in_turn = max(loads_of(costs, np.arange(len(costs)) % num_bins, num_bins))
    bound = lower_bound(costs, slowness_of(None, num_bins)) / 1000
    assert latest <= 1.005 * bound
    assert in_turn > 1.02 * latest


@pytest.mark.parametrize("seed", range(10))
def test_two_kinds_are_even_at_once(seed):
    """Text-only, picture-heavy and mixed samples: one number per sample would leave one phase uneven."""
    num_bins, draw = 8, skewed_costs(512, 7, 1)
    decoder, vision = skewed_costs(512, seed, 1), np.where(draw < 800_000, 0, 3 * skewed_costs(512, seed + 100, 1))
    bins = spread([decoder, vision], num_bins)
    by_sum = spread([decoder + vision], num_bins)
    for kind in (decoder, vision):
        assert imbalance(loads_of(kind, bins, num_bins)) < 1.005
        assert imbalance(loads_of(kind, by_sum, num_bins)) > 1.01


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**13), st.integers(0, 10**13), st.integers(0, 50)), max_size=40), st.integers(1, 8), st.data())
def test_the_answer_is_complete_and_does_not_depend_on_the_unit(rows, num_bins, data):
    first, second, sizes = (int64([row[k] for row in rows]) for k in range(3))
    speeds = data.draw(st.lists(st.integers(1, 2000), min_size=num_bins, max_size=num_bins))
    bins = spread([first, second], num_bins, sizes, 100, speeds)
    assert len(bins) == len(rows)
    assert set(bins.tolist()) <= set(range(num_bins))
    assert (spread([first.copy(), second.copy()], num_bins, sizes.copy(), 100, list(speeds)) == bins).all()


def test_equal_items_are_dealt_out_evenly():
    assert sorted(spread([int64([5] * 12)], 4).tolist()) == sorted([0, 1, 2, 3] * 3)
    assert spread([int64([7])], 3).tolist() == [0]


def test_an_item_of_one_kind_goes_where_there_is_none_of_it():
    assert spread([int64([8, 0, 0]), int64([0, 4, 4])], 2).tolist() in ([0, 0, 1], [0, 1, 0])


@pytest.mark.parametrize("seed", range(5))
def test_capacities_hold_where_there_is_room(seed):
    rng = np.random.default_rng(seed)
    costs, sizes = skewed_costs(200, seed), rng.integers(1, 100, 200)
    capacity = int(sizes.sum() / 8 * 1.05)
    limited, free = spread([costs], 8, sizes, capacity), spread([costs], 8)
    assert sum_by_bin(limited, sizes, 8).max() <= capacity
    assert sum_by_bin(free, sizes, 8).max() > capacity
    assert imbalance(loads_of(costs, limited, 8)) < 1.02


@pytest.mark.parametrize("seed", range(10))
def test_improving_keeps_the_capacity(seed):
    """From full bins of very unequal cost, where the best exchanges would overfill one."""
    rng = np.random.default_rng(seed)
    bins, sizes = np.arange(80) % 4, np.where(np.arange(80) % 4, rng.integers(1, 30, 80), 15)
    costs = np.where(bins == 0, 50 * sizes, sizes)
    capacity = int(sum_by_bin(bins, sizes, 4).max()) + 3
    items = (costs, np.zeros(80, np.int64), sizes)
    loads = tuple(sum_by_bin(bins, values, 4) for values in items)
    before = loads[0].max()
    improve(items, loads, capacity, slowness_of(None, 4), bins, 0)
    assert sum_by_bin(bins, sizes, 4).max() <= capacity
    assert [load.tolist() for load in loads] == [sum_by_bin(bins, values, 4).tolist() for values in items]
    assert loads[0].max() < 0.8 * before


def test_the_bin_that_is_relieved_is_not_overfilled_either():
    """Its small dear items would be swapped for the large cheap ones of the others, which hold more than the capacity from the start."""
    bins = np.arange(80) % 4
    costs, sizes = np.where(bins == 0, 500 + np.arange(80), 1), np.where(bins == 0, 5, 25)
    items = (costs, np.zeros(80, np.int64), sizes)
    loads = tuple(sum_by_bin(bins, values, 4) for values in items)
    improve(items, loads, 130, slowness_of(None, 4), bins, 0)
    assert 100 < loads[2][0] <= 130
    assert loads[2][1:].max() <= 500


def test_items_that_fit_nowhere_go_to_the_emptiest_bin():
    assert sorted(spread([int64([5, 4, 3])], 2, int64([10, 10, 10]), 12).tolist()) in ([0, 0, 1], [0, 1, 1])


@pytest.mark.parametrize("speeds", [[1000, 900, 1000, 500], [2000, 1000, 1000, 1000]])
def test_slow_bins_get_less(speeds):
    costs = skewed_costs(256, 1, 1)
    loads = loads_of(costs, spread([costs], 4, speeds=speeds), 4)
    finish = [load / speed for load, speed in zip(loads, speeds, strict=True)]
    assert imbalance(finish) < 1.005


@given(st.lists(st.integers(0, 2**62), max_size=100))
def test_sums_beyond_64_bits_are_exact(values):
    assert exact_sum(int64(values)) == sum(values)


@given(st.lists(st.integers(0, 2**60), min_size=1, max_size=50))
def test_scaled_costs_leave_room_for_arithmetic(values):
    first, second = common_scale(int64(values), int64(values[::-1]))
    assert exact_sum(first) + exact_sum(second) <= 2**40
    assert (first == second[::-1]).all()
    small = int64([v % 1000 for v in values])
    assert (common_scale(small)[0] == small).all()


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6), st.lists(st.integers(100, 2000), min_size=1, max_size=3))
@settings(deadline=None)
def test_nothing_beats_the_lower_bound(costs, speeds):
    slowness = slowness_of(speeds, len(speeds))
    best = min(
        max((sum_by_bin(int64(bins), int64(costs), len(speeds)) * slowness).tolist())
        for bins in product(range(len(speeds)), repeat=len(costs))
    )
    # Slowness is rounded down to whole numbers, and speeds worked back from it.
    assert lower_bound(int64(costs), slowness) <= best * 1.002 + 1


@pytest.mark.parametrize("num_kinds", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_candidates_are_the_bins_that_finish_first(num_kinds, seed):
    rng = np.random.default_rng(seed)
    loads = [rng.integers(0, 20, 50), rng.integers(0, 20, 50) * (num_kinds - 1)]  # few values, so that bins tie
    slowness = rng.integers(900, 1100, 50)
    later, marked, candidates, found = np.zeros(50, np.int64), np.zeros(50, np.int64), np.zeros(50, np.int64), np.zeros(7, np.int64)
    count = kernels._candidates(num_kinds, loads, slowness, later, found, marked, candidates)
    measures = [*loads[:num_kinds], np.maximum(*loads)]
    firsts = [np.lexsort((np.arange(50), load * slowness))[:7] for load in measures]
    assert candidates[:count].tolist() == sorted(set(np.concatenate(firsts).tolist()))
