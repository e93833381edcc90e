"""The order in two levels is a bijection, differs by epoch and seed, and keeps neighbouring positions in few blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.errors import PlanError
from megatron_keye.plan.blocks import BlockOrder

sizes = st.tuples(st.integers(1, 300), st.integers(1, 60), st.integers(1, 12))
"""Samples, samples of a block, blocks of a window."""


def epoch_of(order, epoch):
    return order(np.arange(order.num_samples) + epoch * order.num_samples)


@settings(deadline=None)
@given(sizes, st.integers(0, 5), st.integers(0, 1000))
def test_every_epoch_is_a_bijection(sizes, epoch, seed):
    assert sorted(epoch_of(BlockOrder(*sizes, seed), epoch).tolist()) == list(range(sizes[0]))


@settings(deadline=None)
@given(sizes, st.lists(st.integers(0, 2000), max_size=30))
def test_positions_can_be_asked_for_in_any_order(sizes, positions):
    together = BlockOrder(*sizes, 3)(np.array(positions, np.int64)).tolist()
    fresh = BlockOrder(*sizes, 3)
    assert together == [int(fresh(np.array([position]))[0]) for position in positions]


@settings(deadline=None)
@given(sizes, st.integers(0, 5))
def test_a_window_reads_few_stretches(sizes, epoch):
    """Its samples lie side by side in as many stretches as it has blocks, one more where a block goes over the end, and one for the
    samples that fill no block."""
    num_samples, block_samples, blocks_per_window = sizes
    window = block_samples * blocks_per_window
    samples = epoch_of(BlockOrder(*sizes, 0), epoch)
    num_windows = max(1, num_samples // block_samples // blocks_per_window)
    for number in range(num_windows):
        last = number == num_windows - 1
        own = np.sort(samples[number * window : None if last else (number + 1) * window])
        stretches = 1 + int((np.diff(own) > 1).sum())
        assert stretches <= -(-len(own) // block_samples) + 2


def test_samples_of_a_window_are_mixed():
    blocks = epoch_of(BlockOrder(1200, 100, 4, 0), 0) // 100
    changes = (np.diff(blocks[:400]) != 0).mean()
    assert 0.6 < changes < 0.9  # about three quarters of the neighbours, as for a shuffle of four blocks


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_of(BlockOrder(50, 5, 3, seed), epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("num_samples", [10, 31])
@pytest.mark.parametrize("blocks_per_window", [1, 1000])
def test_each_position_sees_each_sample_equally_often(num_samples, blocks_per_window):
    """Chi-squared over epochs stays below its 99.99 % quantile, as for the standard library's shuffle."""
    num_epochs, position = 100 * num_samples, num_samples // 3
    order = BlockOrder(num_samples, 5, blocks_per_window, 1)
    drawn = order(np.arange(num_epochs) * num_samples + position)
    counts = np.bincount(drawn, minlength=num_samples)
    chi_squared = ((counts - 100) ** 2 / 100).sum()
    freedom = num_samples - 1
    assert chi_squared < freedom + 3.72 * (2 * freedom) ** 0.5 + 10


def test_a_billion_samples_need_no_storage():
    order = BlockOrder(10**9, 500, 16, 0)
    samples = order(np.arange(5 * 10**8, 5 * 10**8 + 1000))
    assert len(set(samples.tolist())) == 1000
    assert len(set((np.sort(samples)[1:] - np.sort(samples)[:-1]) // 500)) <= 20


def test_the_order_is_pinned():
    """If this fails, running jobs would resume into another order: restore it, or raise PLAN_VERSION."""
    assert BlockOrder(14, 3, 2, 7)(np.arange(14, 24)).tolist() == [4, 5, 6, 8, 7, 9, 10, 1, 13, 0]


@pytest.mark.parametrize(("sizes", "message"), [((0, 1, 1), "0 samples"), ((5, 0, 1), "at least 1"), ((5, 1, 0), "at least 1")])
def test_impossible_settings_are_refused(sizes, message):
    with pytest.raises(PlanError, match=message):
        BlockOrder(*sizes, 0)
