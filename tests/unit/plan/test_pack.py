"""Rows are within limits, hold every sample once, are few, and cost about the same."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.contract.media import SampleShape
from megatron_keye.plan.pack import Item, best_fit_decreasing, pack_rows, round_up

SEQ, PAD = 64, 4


def items_of(lengths, pad=PAD):
    """One item per length; a token costs more the longer its document is."""
    return [
        Item(slot, 100 + slot, SampleShape(n), round_up(n, pad), decoder_cost=n * (10 + n), vision_cost=0) for slot, n in enumerate(lengths)
    ]


def rows_needed(items, seq_length_tokens):
    return max(best_fit_decreasing([item.padded_tokens for item in items], seq_length_tokens), default=-1) + 1


def next_fit(sizes, capacity):
    """Rows that packing in order of arrival needs."""
    rows, room = 0, 0
    for size in sizes:
        if size > room:
            rows, room = rows + 1, capacity
        room -= size
    return rows


def fewest_bins(sizes, capacity):
    """By trying every assignment."""
    for num_bins in range(1, len(sizes) + 1):
        for bins in itertools.product(range(num_bins), repeat=len(sizes)):
            if all(sum(s for s, b in zip(sizes, bins, strict=True) if b == k) <= capacity for k in range(num_bins)):
                return num_bins
    return 0


@given(st.integers(0, 500), st.integers(1, 80))
def test_round_up_is_the_next_multiple_and_never_zero(value, multiple):
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert rounded >= max(value, 1)
    assert rounded == multiple or rounded - multiple < value


lengths = st.lists(st.integers(0, SEQ), max_size=40)


@given(lengths, st.integers(0, 5), st.sampled_from([1, 4]))
def test_rows_hold_every_item_once_within_limits(lengths, spare_rows, pad):
    items = items_of(lengths, pad)
    num_rows = rows_needed(items, SEQ) + spare_rows
    rows = pack_rows(items, num_rows, SEQ, pad)
    assert len(rows) == num_rows
    assert sorted(d.sample for row in rows for d in row.documents) == [item.sample for item in items]
    for row in rows:
        assert row.num_tokens == sum(d.padded_tokens for d in row.documents) or not row.documents
        assert pad <= row.num_tokens <= SEQ
        assert [d.start for d in row.documents] == row.cu_seqlens[:-1] or not row.documents
        assert row.cu_seqlens == sorted(set(row.cu_seqlens))
        assert row.cu_seqlens[-1] == row.num_tokens
        assert [d.sample for d in row.documents] == sorted(d.sample for d in row.documents)
        for document in row.documents:
            assert document.padded_tokens % pad == 0
            assert document.padded_tokens >= document.shape.num_tokens


@pytest.mark.parametrize("seed", range(100))
def test_rows_that_must_be_full_are_not_overfull(seed):
    """Documents cut from whole rows, so that one token too many in a row would be easy to gain."""
    rng = random.Random(seed)
    lengths = []
    for _ in range(4):
        cuts = sorted(rng.sample(range(1, SEQ), rng.randint(0, 3)))
        lengths += [end - start for start, end in itertools.pairwise([0, *cuts, SEQ])]
    items = items_of(lengths, pad=1)
    rows = pack_rows(items, rows_needed(items, SEQ), SEQ, 1)
    assert max(row.num_tokens for row in rows) <= SEQ


@given(lengths)
def test_rows_come_by_falling_cost_with_empty_rows_last(lengths):
    items = items_of(lengths)
    costs = {item.sample: item.decoder_cost for item in items}
    rows = pack_rows(items, rows_needed(items, SEQ) + 2, SEQ, PAD)
    filled = [sum(costs[d.sample] for d in row.documents) for row in rows if row.documents]
    assert filled == sorted(filled, reverse=True)
    assert all(not row.documents and row.num_tokens == PAD for row in rows[len(filled) :])


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=6), st.integers(20, 30))
def test_best_fit_decreasing_is_near_the_fewest_bins(sizes, capacity):
    bins = best_fit_decreasing(sizes, capacity)
    used = max(bins, default=-1) + 1
    assert set(bins) == set(range(used))
    assert 9 * used <= 11 * fewest_bins(sizes, capacity) + 9


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_best_fit_decreasing_needs_no_more_bins_than_arrival_order(sizes):
    used = max(best_fit_decreasing(sizes, 40)) + 1
    assert -(-sum(sizes) // 40) <= used <= next_fit(sizes, 40)


def test_a_larger_item_gets_a_bin_of_its_own():
    assert best_fit_decreasing([3, 25, 4], 10) == [1, 0, 1]


def test_spare_rows_are_used_to_even_out_cost():
    """Five documents fit one row, but a replica that runs four microbatches anyway spreads them."""
    rows = pack_rows(items_of([20, 12, 12, 8, 4]), 4, SEQ, PAD)
    assert [row.num_tokens for row in rows] == [20, 12, 12, 12]


def test_when_equal_cost_does_not_fit_the_fewest_rows_win():
    """By cost, 20 joins 36 and then 12 has no room anywhere; by size 36 + 28 and 32 + 20 + 12 fill two rows."""
    items = items_of([36, 32, 28, 20, 12])
    assert rows_needed(items, SEQ) == 2
    assert [row.num_tokens for row in pack_rows(items, 2, SEQ, PAD)] == [64, 64]


@pytest.mark.parametrize("lengths", [[8] * 9, [64, 4, 4, 64]])
def test_ties_go_by_slot_and_the_answer_is_always_the_same(lengths):
    items = items_of(lengths)
    first = pack_rows(items, 4, SEQ, PAD)
    assert pack_rows(items, 4, SEQ, PAD) == first
    assert first[0].documents[0].sample == 100
