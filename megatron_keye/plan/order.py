"""The order of samples: a keyed permutation per epoch, computed position by position and never stored."""

import hashlib
from math import isqrt

from megatron_keye.errors import PlanError

_NUM_ROUNDS = 8
_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): 64 bits in, 64 well-mixed bits out."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


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

    def __call__(self, position: int) -> int:
        """The sample at `position`, 0 <= position < num_samples."""
        if not 0 <= position < self.num_samples:
            raise PlanError(f"Position {position} is outside an order of {self.num_samples} samples.")
        value = self._permute_rectangle(position)
        while value >= self.num_samples:
            value = self._permute_rectangle(value)
        return value

    def _permute_rectangle(self, value: int) -> int:
        left, right = divmod(value, self._right_size)
        for i in range(0, _NUM_ROUNDS, 2):
            left = (left + _mix((right + self._round_keys[i]) & _MASK)) % self._left_size
            right = (right + _mix((left + self._round_keys[i + 1]) & _MASK)) % self._right_size
        return left * self._right_size + right


def epoch_permutation(epoch: int, num_samples: int, seed: int) -> Permutation:
    """The order of one epoch of the run with this seed."""
    return Permutation(num_samples, f"sample order: seed {seed}, epoch {epoch}".encode())


def sample_at(position: int, num_samples: int, seed: int) -> int:
    """The sample at `position` of the endless sequence of epochs; each epoch visits every sample once."""
    _check_not_empty(num_samples)
    epoch, offset = divmod(position, num_samples)
    return epoch_permutation(epoch, num_samples, seed)(offset)


def samples_at(start: int, count: int, num_samples: int, seed: int) -> tuple[int, ...]:
    """The samples at positions start .. start + count - 1; where these span an epoch's end a sample may occur twice."""
    _check_not_empty(num_samples)
    samples: list[int] = []
    while len(samples) < count:
        epoch, offset = divmod(start + len(samples), num_samples)
        permutation = epoch_permutation(epoch, num_samples, seed)
        stop = min(num_samples, offset + count - len(samples))
        samples.extend(permutation(i) for i in range(offset, stop))
    return tuple(samples)


def _check_not_empty(num_samples: int) -> None:
    if num_samples < 1:
        raise PlanError(f"The dataset has {num_samples} samples; an order needs at least one. Check data.train and its index.")
