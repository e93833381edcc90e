"""The zigzag split of packed rows over context-parallel ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.plan.context_split import gathered_order, local_tokens

cp_sizes = st.integers(1, 6)
chunk_counts = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def boundaries_of(chunks, cp_size):
    return np.cumsum([0, *(2 * cp_size * chunk for chunk in chunks)]).tolist()


@given(chunk_counts, cp_sizes)
def test_ranks_hold_every_token_once_and_equally_many_of_each_document(chunks, cp_size):
    boundaries = boundaries_of(chunks, cp_size)
    shares = [local_tokens(boundaries, cp_size, rank) for rank in range(cp_size)]
    assert sorted(np.concatenate(shares)) == list(range(boundaries[-1]))
    for share in shares:
        assert share.dtype == np.int64
        assert np.array_equal(share, np.sort(share))
        held, _ = np.histogram(share, bins=boundaries)
        assert np.array_equal(held, np.diff(boundaries) // cp_size)


@given(chunk_counts, cp_sizes)
def test_causal_work_is_equal(chunks, cp_size):
    boundaries = boundaries_of(chunks, cp_size)
    starts = np.repeat(boundaries[:-1], np.diff(boundaries))
    keys_seen = np.arange(boundaries[-1]) - starts + 1
    work = {int(keys_seen[local_tokens(boundaries, cp_size, rank)].sum()) for rank in range(cp_size)}
    assert len(work) == 1


@given(chunk_counts, cp_sizes)
def test_gathered_order_restores_the_row(chunks, cp_size):
    boundaries = boundaries_of(chunks, cp_size)
    gathered = np.concatenate([local_tokens(boundaries, cp_size, rank) for rank in range(cp_size)])
    assert np.array_equal(gathered[gathered_order(boundaries, cp_size)], np.arange(boundaries[-1]))


def test_two_ranks_by_hand():
    assert local_tokens([0, 8, 12], 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert local_tokens([0, 8, 12], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


def test_a_document_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="6 tokens .* 2 x 2 equal chunks"):
        local_tokens([0, 8, 14], 2, 0)
