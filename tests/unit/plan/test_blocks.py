"""The order in two levels is a bijection, differs by epoch and seed, and keeps neighbouring positions in few blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.errors import PlanError
from megatron_keye.plan.blocks import BlockOrder, block_starts

block_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=20)


def starts_of(sizes):
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def epoch_of(order, epoch):
    return order(np.arange(order.num_samples) + epoch * order.num_samples)


@settings(deadline=None)
@given(block_sizes, st.integers(1, 25), st.integers(0, 5), st.integers(0, 1000))
def test_every_epoch_is_a_bijection(sizes, blocks_per_window, epoch, seed):
    order = BlockOrder(starts_of(sizes), blocks_per_window, seed)
    assert sorted(epoch_of(order, epoch).tolist()) == list(range(sum(sizes)))


@settings(deadline=None)
@given(block_sizes, st.integers(1, 25), st.lists(st.integers(0, 2000), max_size=30))
def test_positions_can_be_asked_for_in_any_order(sizes, blocks_per_window, positions):
    order = BlockOrder(starts_of(sizes), blocks_per_window, 3)
    together = order(np.array(positions, np.int64)).tolist()
    fresh = BlockOrder(starts_of(sizes), blocks_per_window, 3)
    assert together == [int(fresh(np.array([position]))[0]) for position in positions]


@settings(deadline=None)
@given(block_sizes, st.integers(1, 8))
def test_a_window_reads_only_its_blocks(sizes, blocks_per_window):
    """Walking through an epoch, all samples of a few blocks come before any of the next few."""
    starts = starts_of(sizes)
    blocks = np.searchsorted(starts, epoch_of(BlockOrder(starts, blocks_per_window, 0), 1), side="right") - 1
    seen, at = set(), 0
    while at < len(blocks):
        window = set()
        end = at
        while end < len(blocks) and (blocks[end] in window or len(window) < blocks_per_window):
            window.add(blocks[end])
            end += 1
        assert not window & seen
        assert end - at == sum(sizes[block] for block in window)
        seen |= window
        at = end


def test_samples_of_a_window_are_mixed():
    blocks = epoch_of(BlockOrder(starts_of([100] * 12), 4, 0), 0) // 100
    changes = (np.diff(blocks[:400]) != 0).mean()
    assert 0.6 < changes < 0.9  # three quarters of the neighbours, as for a shuffle of four blocks


def test_epochs_and_seeds_differ():
    starts = starts_of([5] * 10)
    orders = {tuple(epoch_of(BlockOrder(starts, 3, seed), epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_is_pinned():
    """If this fails, running jobs would resume into another order: restore it, or raise PLAN_VERSION."""
    assert BlockOrder(starts_of([3, 4, 2, 5]), 2, 7)(np.arange(14, 24)).tolist() == [9, 8, 10, 12, 13, 7, 11, 2, 3, 0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 1)), min_size=1, max_size=60), st.integers(1, 200))
def test_blocks_are_bounded_and_stay_in_a_shard(samples, block_bytes):
    sizes = np.array([size for size, _ in samples], np.int64)
    shard_of = np.cumsum([new for _, new in samples])
    starts = block_starts(sizes, shard_of, block_bytes)
    assert starts[0] == 0 and starts[-1] == len(sizes)
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        assert end > begin
        assert shard_of[begin] == shard_of[end - 1]
        assert sizes[begin:end].sum() <= block_bytes or end == begin + 1
        # The next sample would not have fitted, or lies in another shard.
        assert end == len(sizes) or shard_of[end] != shard_of[begin] or sizes[begin : end + 1].sum() > block_bytes


@pytest.mark.parametrize("starts", [[0], [1, 2], [0, 2, 2], []])
def test_damaged_boundaries_are_refused(starts):
    with pytest.raises(PlanError, match="boundaries"):
        BlockOrder(np.array(starts, np.int64), 1, 0)


def test_empty_and_impossible_settings_are_refused():
    with pytest.raises(PlanError, match="at least one"):
        block_starts(np.zeros(0, np.int64), np.zeros(0, np.int64))
    with pytest.raises(PlanError, match="blocks_per_window"):
        BlockOrder(starts_of([1]), 0, 0)
