"""The order is a permutation at every size, differs per epoch and seed, and never changes between versions unnoticed."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.errors import PlanError
from megatron_keye.plan.order import Permutation, sample_at, samples_at


@pytest.mark.parametrize("num_samples", [*range(1, 70), 127, 128, 129, 1000, 1024, 4097, 10_007])
def test_permutation_is_a_bijection(num_samples):
    permutation = Permutation(num_samples, b"key")
    assert sorted(permutation(i) for i in range(num_samples)) == list(range(num_samples))


@given(st.integers(1, 3000), st.binary(max_size=16))
def test_permutation_is_a_bijection_for_any_key(num_samples, key):
    permutation = Permutation(num_samples, key)
    assert len({permutation(i) for i in range(num_samples)}) == num_samples


@given(st.integers(1, 2**60), st.binary(max_size=8), st.lists(st.integers(0, 2**60), max_size=50))
def test_many_positions_at_once_are_each_alone(num_samples, key, positions):
    permutation = Permutation(num_samples, key)
    positions = [position % num_samples for position in positions]
    assert permutation.of(np.array(positions, np.int64)).tolist() == [permutation(position) for position in positions]


@given(st.integers(1, 2**50), st.integers(0, 2**40), st.integers(-(2**63), 2**63))
def test_huge_datasets_need_no_storage(num_samples, position, seed):
    assert 0 <= sample_at(position, num_samples, seed) < num_samples


def test_epochs_and_seeds_give_different_orders():
    epochs = {samples_at(epoch * 50, 50, 50, seed) for epoch in range(10) for seed in range(10)}
    assert len(epochs) == 100


@pytest.mark.parametrize("num_samples", [10, 97])
def test_each_position_sees_each_sample_equally_often(num_samples):
    """Chi-squared over epochs stays below its 99.99 % quantile, as for the standard library's shuffle."""
    num_epochs, position = 200 * num_samples, num_samples // 3
    counts = [0] * num_samples
    for epoch in range(num_epochs):
        counts[sample_at(epoch * num_samples + position, num_samples, seed=1)] += 1
    chi_squared = sum((count - 200) ** 2 / 200 for count in counts)
    degrees = num_samples - 1
    assert chi_squared < degrees + 3.72 * (2 * degrees) ** 0.5 + 9.2


def test_neighbours_are_as_far_apart_as_in_a_shuffle():
    num_samples = 5000
    ours = samples_at(0, num_samples, num_samples, seed=3)
    reference = random.Random(3).sample(range(num_samples), num_samples)

    def mean_step(order):
        return sum(abs(a - b) for a, b in itertools.pairwise(order)) / num_samples

    assert mean_step(ours) == pytest.approx(mean_step(reference), rel=0.05)


@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 100))
def test_a_range_of_positions_is_each_position_alone(num_samples, start, count):
    assert samples_at(start, count, num_samples, 5) == tuple(sample_at(start + i, num_samples, 5) for i in range(count))


def test_order_is_pinned():
    """If this fails, running jobs would resume into another order: restore it, or raise PLAN_VERSION."""
    assert samples_at(95, 12, 100, seed=42) == (74, 87, 84, 9, 67, 23, 57, 31, 27, 86, 82, 77)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_empty_dataset_is_refused(num_samples):
    with pytest.raises(PlanError, match="at least one"):
        Permutation(num_samples, b"")


@pytest.mark.parametrize("position", [-1, 5])
def test_position_outside_is_refused(position):
    with pytest.raises(PlanError, match="outside"):
        Permutation(5, b"")(position)
    with pytest.raises(PlanError, match="outside"):
        Permutation(5, b"").of(np.array([0, position]))
