"""How much each pixel of a row counts for each pixel of the resized row, in the integers of Pillow and of torch.

Both find the same shares of a pixel in float64: torch took Pillow's code over. Then they round them to integers, each with its own number
of bits. An axis has few different weights and clips have many frames, so those asked for last are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_PILLOW_BITS = 22
_TORCH_MOST_BITS = 22
_TORCH_WEIGHT_LIMIT = 1 << 15
"""Torch's weights are int16."""
_BICUBIC_A = -0.5
_KEPT = 8


@dataclass(frozen=True, slots=True, eq=False)
class AxisWeights:
    """The pixels under each of n output pixels: the `first` one and how many, `counts`, int64 [n] each, and their `weights`,
    int32 [n, most], of which `bits` bits are after the point."""

    first: np.ndarray
    counts: np.ndarray
    weights: np.ndarray
    bits: int


@lru_cache(_KEPT)
def pillow_bicubic_weights(length: int, new_length: int) -> AxisWeights:
    """As `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's Resample.c."""
    return _in_integers(*_shares(length, new_length, _bicubic, reach=2.0), _PILLOW_BITS)


@lru_cache(_KEPT)
def torch_bilinear_weights(length: int, new_length: int) -> AxisWeights:
    """As `_compute_index_ranges_int16_weights` of torch's aten/src/ATen/native/cpu/UpSampleKernel.cpp, with antialiasing: the bits are
    the most, up to 22, with which the largest weight, rounded, is below 2**15."""
    first, counts, shares = _shares(length, new_length, _triangle, reach=1.0)
    largest, bits = shares.max(), 0
    while bits < _TORCH_MOST_BITS and int(0.5 + largest * (1 << (bits + 1))) < _TORCH_WEIGHT_LIMIT:
        bits += 1
    return _in_integers(first, counts, shares, bits)


def _shares(
    length: int, new_length: int, filter_: Callable[[np.ndarray], np.ndarray], reach: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`first` and `counts` of AxisWeights, and weights float64 [n, most] that sum to 1. The order of operations is the libraries'."""
    scale = length / new_length
    stretch = max(scale, 1.0)
    centers = (np.arange(new_length) + 0.5) * scale
    first = np.maximum(0, (centers - reach * stretch + 0.5).astype(np.int64))
    counts = np.minimum(length, (centers + reach * stretch + 0.5).astype(np.int64)) - first
    taps = np.arange(counts.max())
    shares = filter_((first[:, None] + taps - centers[:, None] + 0.5) * (1.0 / stretch))
    shares[taps >= counts[:, None]] = 0
    sums = np.zeros(new_length)
    for tap in taps:  # one by one, as a sum of floats depends on its order
        sums += shares[:, tap]
    return first, counts, shares / sums[:, None]


def _in_integers(first: np.ndarray, counts: np.ndarray, shares: np.ndarray, bits: int) -> AxisWeights:
    """Rounded to the nearest, halves away from 0."""
    weights = shares * (1 << bits)
    return AxisWeights(first, counts, np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32), bits)


def _bicubic(distance: np.ndarray) -> np.ndarray:
    x, a = np.abs(distance), _BICUBIC_A
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _triangle(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(distance), 0.0)
