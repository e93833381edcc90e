"""Items over bins so that the last bin finishes as early as it can: largest first, then moves and swaps.

One barrier waits for the sum of an item's costs: one kind. A barrier between two phases waits for the slowest bin of each: two
kinds, and the time is the sum of the two latest. Integers throughout, ties by number: the same answer on every host.
"""

from collections.abc import Sequence

import numpy as np

from megatron_keye.plan.kernels import assign, assign_in_blocks, refine

NO_LIMIT = 1 << 61
SPEED_BASE = 1000
"""Speeds are per mille of the usual one."""

_TIME_BITS = 40
"""All costs together stay below 2 ** 40, and times a slowness below 2 ** 61."""
_SHARE_BITS = 28
_FULL_SCAN_STEPS = 3 << 20
_BLOCK_ITEMS, _CANDIDATES_PER_KIND = 128, 32
_PARTNERS = 16
_PAIRS, _PAIRS_PER_ITEM = 1024, 16
_CLOSE_ENOUGH = 1024


def spread(
    kinds: Sequence[np.ndarray],
    num_bins: int,
    sizes: np.ndarray | None = None,
    capacity: int = NO_LIMIT,
    speeds: Sequence[int] | None = None,
) -> np.ndarray:
    """The bin of each item, int64 [n].

    `kinds` are one or two arrays int64 [n] of costs in one unit, `sizes` int64 [n] what `capacity` limits per bin, and `speeds`
    how fast each bin is, per mille. A bin exceeds its capacity only where the greedy pass finds room nowhere.
    """
    first, second = common_scale(kinds[0], kinds[1] if len(kinds) > 1 else np.zeros_like(kinds[0]))
    sizes = np.zeros_like(first) if sizes is None else sizes.astype(np.int64)
    slowness = slowness_of(speeds, num_bins)
    bins = np.zeros(len(first), np.int64)
    if num_bins == 1 or not len(first):
        return bins
    _greedy(first, second, sizes, capacity, slowness, bins)
    _improve(first, second, sizes, capacity, slowness, bins)
    return bins


def slowness_of(speeds: Sequence[int] | None, num_bins: int) -> np.ndarray:
    """Time per cost of each bin, int64 [num_bins]: 1000 at the usual speed."""
    if speeds is None:
        return np.full(num_bins, SPEED_BASE, np.int64)
    return SPEED_BASE**2 // np.asarray(speeds, np.int64)


def common_scale(*kinds: np.ndarray) -> tuple[np.ndarray, ...]:
    """Costs shifted right alike until all together stay below 2 ** 40."""
    shift = max(0, sum(exact_sum(kind) for kind in kinds).bit_length() - _TIME_BITS)
    return tuple(np.ascontiguousarray(kind, np.int64) >> shift for kind in kinds)


def exact_sum(values: np.ndarray) -> int:
    """The sum of non-negative int64 values, which may exceed int64."""
    return (int((values >> 31).sum()) << 31) + int((values & ((1 << 31) - 1)).sum())


def lower_bound(costs: np.ndarray, slowness: np.ndarray) -> int:
    """No placement finishes before all bins together could, nor before the fastest bin has done the largest item."""
    largest = int(costs.max(initial=0)) * int(slowness.min())
    rate = sum(SPEED_BASE**2 // int(s) for s in slowness)
    return max(-(-exact_sum(costs) * SPEED_BASE**2 // rate), largest)


def _shares(costs: np.ndarray) -> np.ndarray:
    """Costs as shares of their total, in units of 2 ** -28."""
    costs = costs >> max(0, int(costs.max(initial=0)).bit_length() - _SHARE_BITS)
    return (costs << _SHARE_BITS) // max(1, int(costs.sum()))


def _greedy(first: np.ndarray, second: np.ndarray, sizes: np.ndarray, capacity: int, slowness: np.ndarray, bins: np.ndarray) -> None:
    """Fills `bins`. Items go by their larger share; the largest ones consider every bin, the others those that finish first."""
    num_bins = len(slowness)
    a, b = _shares(first), _shares(second)
    order = np.argsort(-np.maximum(a, b), kind="stable")
    levels = np.array([lower_bound(a, slowness), lower_bound(b, slowness)], np.int64)
    loads = tuple(np.zeros(num_bins, np.int64) for _ in range(3))
    few_bins = num_bins <= 3 * _CANDIDATES_PER_KIND
    head = len(order) if few_bins else max(1, _FULL_SCAN_STEPS // num_bins)
    rules = ((a, b, sizes), loads, capacity, slowness, levels, bins)
    assign(4 * num_bins * len(order), order[:head], np.arange(num_bins), *rules)
    if head >= len(order):
        return
    later, marked, candidates = (np.zeros(num_bins, np.int64) for _ in range(3))
    found = np.zeros(_CANDIDATES_PER_KIND, np.int64)
    steps = 4 * 3 * _CANDIDATES_PER_KIND * len(order)
    assign_in_blocks(steps, order[head:], _BLOCK_ITEMS, 1 + int(b.any()), *rules, later, found, marked, candidates)


def _improve(first: np.ndarray, second: np.ndarray, sizes: np.ndarray, capacity: int, slowness: np.ndarray, bins: np.ndarray) -> None:
    best = lower_bound(first, slowness) + lower_bound(second, slowness)
    loads = tuple(sum_by_bin(bins, costs, len(slowness)) for costs in (first, second, sizes))
    improve((first, second, sizes), loads, capacity, slowness, bins, best + best // _CLOSE_ENOUGH)


def improve(
    items: tuple[np.ndarray, ...], loads: tuple[np.ndarray, ...], capacity: int, slowness: np.ndarray, bins: np.ndarray, floor: int
) -> None:
    """Move and swap items while that lowers max(finish of one kind) + max(finish of the other) and the sum is above `floor`.

    `items` are the two kinds of cost and the size of each, int64 [n], and `loads` the same of each bin, int64 [bins], which may hold more
    than these items' sums. Changes `loads` and `bins`.
    """
    num_items, num_bins = len(bins), len(slowness)
    first, following, partners, found = (np.zeros(n, np.int64) for n in (num_bins, num_items, min(_PARTNERS, num_bins - 1), 4))
    tops = (np.zeros(3, np.int64), np.zeros(3, np.int64))
    budget = _PAIRS + _PAIRS_PER_ITEM * num_items
    refine(4 * budget, items, loads, capacity, slowness, bins, first, following, tops, partners, found, floor, budget)


def sum_by_bin(bins: np.ndarray, values: np.ndarray, num_bins: int) -> np.ndarray:
    """int64 [num_bins]: the exact sums of int64 `values` by bin."""
    sums = np.zeros(num_bins, np.int64)
    np.add.at(sums, bins, values)
    return sums
