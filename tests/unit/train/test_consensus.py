"""The one sum by which ranks agree: digests as words that may wrap, in a world that exists only in arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_keye.plan.digest import NO_TABLE, PLAN_COLUMNS, table_digest
from megatron_keye.train import consensus

CPU = torch.device("cpu")


class FakeWorld:
    """A group whose rank 0 is this process; `others` are the words that every other rank contributes to the sum."""

    def __init__(self, others):
        self.others = torch.tensor(others, dtype=torch.int64)

    def size(self):
        return len(self.others) + 1

    def rank(self):
        return 0


def asked_for_the_difference(table, world, device):
    raise AssertionError("asked for the difference")


def agree(table, counts, others):
    def all_reduce(tensor, group, op=None):
        if op is None:
            tensor += group.others.sum(dim=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consensus.dist, "all_reduce", all_reduce)
        patch.setattr(consensus, "_raise_difference", asked_for_the_difference)
        return consensus.agree(table, counts, None, FakeWorld(others), CPU)


def words_of(digest):
    return np.frombuffer(digest, dtype="<i8").tolist()


tables = arrays(np.int64, st.tuples(st.integers(0, 5), st.just(len(PLAN_COLUMNS))), elements=st.integers(-1, 1 << 62))


@given(tables, st.integers(1, 2000), st.integers(0, 10**9), st.integers(0, 10**9))
def test_equal_plans_agree_in_a_world_of_any_size_and_counts_add_up(table, num_others, own, each):
    others = [[0, each, 1, *words_of(table_digest(table))]] * num_others
    assert agree(table, (own, 0), others) == [own + num_others * each, num_others]


@given(st.sampled_from(range(256)), st.integers(1, 5), st.data())
def test_one_bit_of_difference_on_one_rank_is_noticed(bit, num_others, data):
    digest = table_digest(NO_TABLE)
    flipped = (int.from_bytes(digest, "little") ^ 1 << bit).to_bytes(32, "little")
    others = [[0, 0, *words_of(digest)] for _ in range(num_others)]
    others[data.draw(st.integers(0, num_others - 1))] = [0, 0, *words_of(flipped)]
    with pytest.raises(AssertionError, match="asked for the difference"):
        agree(NO_TABLE, (0,), others)
