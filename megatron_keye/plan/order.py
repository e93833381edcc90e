"""The order of samples: a keyed permutation per epoch, computed position by position and never stored."""

import hashlib
from collections.abc import Callable
from math import isqrt
from typing import Protocol

import numpy as np

from megatron_keye.errors import PlanError

_NUM_ROUNDS = 8


def _mix_all(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of uint64 values: 64 bits in, 64 well-mixed bits out."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A bijection of 0 .. num_samples - 1, chosen by `key`, with O(1) time and memory per position.

    A Feistel network over pairs (left, right) of a left_size x right_size rectangle that just covers num_samples. Each
    round adds a keyed function of one half to the other, which can be undone, so the network permutes the rectangle;
    walking on from values outside 0 .. num_samples - 1 keeps it a bijection there (Black and Rogaway, CT-RSA 2002).
    """

    def __init__(self, num_samples: int, key: bytes):
        _check_not_empty(num_samples)
        self.num_samples = num_samples
        self._left_size = isqrt(num_samples - 1) + 1
        self._right_size = -(-num_samples // self._left_size)
        keys = hashlib.shake_256(key).digest(8 * _NUM_ROUNDS)
        self._round_keys = [int.from_bytes(keys[8 * i : 8 * i + 8], "little") for i in range(_NUM_ROUNDS)]

    def of(self, positions: np.ndarray) -> np.ndarray:
        """The samples at `positions`, int64 [n], each 0 <= position < num_samples. Raises PlanError for others."""
        outside = positions[(positions < 0) | (positions >= self.num_samples)]
        if len(outside):
            raise PlanError(f"Position {outside[0]} is outside an order of {self.num_samples} samples.")
        values = self._permute_rectangle(positions.astype(np.uint64))
        walking = np.flatnonzero(values >= self.num_samples)
        while len(walking):
            values[walking] = self._permute_rectangle(values[walking])
            walking = walking[values[walking] >= self.num_samples]
        return values.astype(np.int64)

    def _permute_rectangle(self, values: np.ndarray) -> np.ndarray:
        """Of uint64 values within the rectangle. Mixed halves are reduced before they are added, so that sums do not wrap around."""
        left_size, right_size = np.uint64(self._left_size), np.uint64(self._right_size)
        left, right = np.divmod(values, right_size)
        keys = np.array(self._round_keys, np.uint64)
        for i in range(0, _NUM_ROUNDS, 2):
            left = (left + _mix_all(right + keys[i]) % left_size) % left_size
            right = (right + _mix_all(left + keys[i + 1]) % right_size) % right_size
        return left * right_size + right


class Order(Protocol):
    """An endless sequence over samples 0 .. num_samples - 1, of which any position can be asked for."""

    num_samples: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The samples at `positions`, int64 [n]."""


def by_epoch(positions: np.ndarray, num_samples: int, order_of: Callable[[int], Callable[[np.ndarray], np.ndarray]]) -> np.ndarray:
    """int64 [n]: `order_of(epoch)` applied to the offsets of the positions in each epoch."""
    epochs, offsets = np.divmod(positions, num_samples)
    samples = np.empty_like(offsets)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        samples[here] = order_of(epoch)(offsets[here])
    return samples


def _check_not_empty(num_samples: int) -> None:
    if num_samples < 1:
        raise PlanError(f"The dataset has {num_samples} samples; an order needs at least one. Check data.train and its index.")
