"""Pillow's bicubic resize of RGB pixels, to the bit, in a quarter of its time: vectors of a compiled kernel instead of pixels one by one.

Pillow weighs the pixels under each output pixel in integers of 22 bits after the point, row by row and then column by column, and
rounds to uint8 in between. Its sums of integers do not depend on their order, so ours are the same. The kernel adds whole rows; for
the horizontal pass pictures are transposed, a strip at a time. Without numba, and for small pictures, Pillow does it.
"""

from functools import cache

import cv2
import numpy as np
import PIL
from PIL import Image

from megatron_keye.data.media.resize import Size
from megatron_keye.plan.compiled import compile_function, has_numba

_CHANNELS = 3
_WEIGHT_BITS = 22
_BICUBIC_A = -0.5
_BICUBIC_REACH = 2.0
_STRIP_ROWS = 128
"""Transposed together: few enough for the second-level cache."""
_COMPILED_FROM_PIXELS = 1 << 16
"""Pictures below this take Pillow about a millisecond, which does not pay for loading compiled code."""
_TALL_FIRST = int(PIL.__version__.split(".")[0]) >= 13
"""Since version 13 Pillow begins with columns where height shrinks by more than twice what width does, in pixels."""


def resize_bicubic(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [H, W, 3], contiguous, to uint8 [h, w, 3]: the bytes of `Image.resize(..., BICUBIC)` of the installed Pillow."""
    (height, width, _), (new_height, new_width) = image.shape, size
    if max(height * width, new_height * new_width) < _COMPILED_FROM_PIXELS or not has_numba():
        return np.array(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC))
    return _resize(image, size)


def _resize(image: np.ndarray, size: Size) -> np.ndarray:
    (height, width, _), (new_height, new_width) = image.shape, size
    if _TALL_FIRST and height > new_height and height - new_height > 2 * (width - new_width):
        return _resize_rows(_resize_columns(image, new_height), new_width)
    return _resize_columns(_resize_rows(image, new_width), new_height)


def _resize_columns(image: np.ndarray, new_height: int) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [new_height, W, 3]."""
    height, width, _ = image.shape
    if height == new_height:
        return image
    resized = np.empty((new_height, width * _CHANNELS), np.uint8)
    _kernel()(image.reshape(height, -1), *_weights(height, new_height), 1, resized)
    return resized.reshape(new_height, width, _CHANNELS)


def _resize_rows(image: np.ndarray, new_width: int) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [H, new_width, 3]."""
    height, width, _ = image.shape
    if width == new_width:
        return image
    weights, rows = _weights(width, new_width), image.reshape(height, -1)
    resized = np.empty((height, new_width * _CHANNELS), np.uint8)
    for top in range(0, height, _STRIP_ROWS):
        columns = cv2.transpose(rows[top : top + _STRIP_ROWS])
        new_columns = np.empty((new_width * _CHANNELS, columns.shape[1]), np.uint8)
        _kernel()(columns, *weights, _CHANNELS, new_columns)
        cv2.transpose(new_columns, resized[top : top + _STRIP_ROWS])
    return resized.reshape(height, new_width, _CHANNELS)


def _weights(length: int, new_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first pixel under each of `new_length` output pixels and their number, int64 [n] each, and weights int32 [n, most].

    The order of operations is Pillow's (`precompute_coeffs` and `normalize_coeffs_8bpc` of its Resample.c), in float64.
    """
    scale = length / new_length
    stretch = max(scale, 1.0)
    reach = _BICUBIC_REACH * stretch
    centers = (np.arange(new_length) + 0.5) * scale
    first = np.maximum(0, (centers - reach + 0.5).astype(np.int64))
    counts = np.minimum(length, (centers + reach + 0.5).astype(np.int64)) - first
    taps = np.arange(counts.max())
    weights = _bicubic((first[:, None] + taps - centers[:, None] + 0.5) * (1.0 / stretch))
    weights[taps >= counts[:, None]] = 0
    sums = np.zeros(new_length)
    for tap in taps:  # in Pillow's order, as a sum of floats depends on it
        sums += weights[:, tap]
    weights = weights / sums[:, None] * (1 << _WEIGHT_BITS)
    return first, counts, np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)


def _bicubic(distance: np.ndarray) -> np.ndarray:
    x, a = np.abs(distance), _BICUBIC_A
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _weigh_rows(rows, first, counts, weights, channels, out):
    """Every row of `out` is the weighted sum of some `rows`; those of one channel lie `channels` apart. uint8, [n, m] and [k, m]."""
    sums = np.empty(rows.shape[1], np.int32)
    for pixel in range(len(first)):
        for channel in range(channels):
            sums[:] = np.int32(1 << (_WEIGHT_BITS - 1))
            for tap in range(counts[pixel]):
                weight, row = weights[pixel, tap], rows[(first[pixel] + tap) * channels + channel]
                for column in range(len(sums)):
                    sums[column] += weight * np.int32(row[column])
            new_row = out[pixel * channels + channel]
            for column in range(len(sums)):
                value = sums[column] >> np.int32(_WEIGHT_BITS)
                new_row[column] = np.uint8(min(max(value, np.int32(0)), np.int32(255)))


@cache
def _kernel():
    return compile_function(_weigh_rows)
