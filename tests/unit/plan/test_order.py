"""The permutation is a bijection at every size and for every key, and mixes as a shuffle does."""

import hashlib
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.errors import PlanError
from megatron_keye.plan.order import Permutation


def mix(value):
    """SplitMix64's finalizer on Python's integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


def reference(num_samples, key, position):
    """One position, on Python's integers, which neither wrap around nor round."""
    left_size = math.isqrt(num_samples - 1) + 1
    right_size = -(-num_samples // left_size)
    keys = [int.from_bytes(hashlib.shake_256(key).digest(64)[8 * i : 8 * i + 8], "little") for i in range(8)]
    while True:
        left, right = divmod(position, right_size)
        for i in range(0, 8, 2):
            left = (left + mix((right + keys[i]) % 2**64)) % left_size
            right = (right + mix((left + keys[i + 1]) % 2**64)) % right_size
        position = left * right_size + right
        if position < num_samples:
            return position


@pytest.mark.parametrize("num_samples", [*range(1, 70), 127, 128, 129, 1000, 1024, 4097, 10_007])
def test_permutation_is_a_bijection(num_samples):
    assert sorted(Permutation(num_samples, b"key").of(np.arange(num_samples)).tolist()) == list(range(num_samples))


@given(st.integers(1, 3000), st.binary(max_size=16))
def test_permutation_is_a_bijection_for_any_key(num_samples, key):
    assert len(set(Permutation(num_samples, key).of(np.arange(num_samples)).tolist())) == num_samples


@given(st.integers(1, 2**60), st.binary(max_size=8), st.lists(st.integers(0, 2**60), max_size=50))
def test_many_positions_at_once_are_each_alone(num_samples, key, positions):
    positions = [position % num_samples for position in positions]
    found = Permutation(num_samples, key).of(np.array(positions, np.int64)).tolist()
    assert found == [reference(num_samples, key, position) for position in positions]


def test_neighbours_are_as_far_apart_as_in_a_shuffle():
    num_samples = 5000
    ours = Permutation(num_samples, b"key").of(np.arange(num_samples)).tolist()
    reference = random.Random(3).sample(range(num_samples), num_samples)

    def mean_step(order):
        return sum(abs(a - b) for a, b in itertools.pairwise(order)) / num_samples

    assert mean_step(ours) == pytest.approx(mean_step(reference), rel=0.05)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_empty_dataset_is_refused(num_samples):
    with pytest.raises(PlanError, match="at least one"):
        Permutation(num_samples, b"")


@pytest.mark.parametrize("position", [-1, 5])
def test_position_outside_is_refused(position):
    with pytest.raises(PlanError, match="outside"):
        Permutation(5, b"").of(np.array([0, position]))
