"""The one sum by which ranks agree: digests as words that may wrap, in a world that exists only in arithmetic."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.errors import PlanError
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


def agree(digest, counts, others):
    def all_reduce(tensor, group, op=None):
        if op is None:
            tensor += group.others.sum(dim=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consensus.dist, "all_reduce", all_reduce)
        patch.setattr(consensus.dist, "broadcast", lambda tensor, src, group: None)
        patch.setattr(consensus.dist, "get_global_rank", lambda group, rank: rank)
        return consensus.agree(digest, counts, None, FakeWorld(others), CPU)


def words_of(digest):
    return np.frombuffer(digest, dtype="<i8").tolist()


@given(st.binary(min_size=32, max_size=32), st.integers(1, 2000), st.integers(0, 10**9), st.integers(0, 10**9))
def test_equal_digests_agree_in_a_world_of_any_size_and_counts_add_up(digest, num_others, own, each):
    others = [[0, each, 1, *words_of(digest)]] * num_others
    assert agree(digest, (own, 0), others) == [own + num_others * each, num_others]


@given(st.sampled_from(range(256)), st.integers(1, 5), st.data())
def test_one_bit_of_difference_on_one_rank_is_noticed(bit, num_others, data):
    digest = hashlib.sha256(b"plan").digest()
    flipped = (int.from_bytes(digest, "little") ^ 1 << bit).to_bytes(32, "little")
    others = [[0, 0, *words_of(digest)] for _ in range(num_others)]
    others[data.draw(st.integers(0, num_others - 1))] = [0, 0, *words_of(flipped)]
    with pytest.raises(PlanError, match="derived different step plans"):
        agree(digest, (0,), others)
