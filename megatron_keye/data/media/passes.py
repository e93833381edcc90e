"""The two passes of a resize, compiled: along columns and along rows of a picture, in integers, rounded to uint8 after each.

Sums of integers do not depend on their order, so these are the bytes of any library that has the same weights and the same order of
passes. The kernel adds whole rows, in vectors; to resize rows, pictures are transposed, a strip at a time. Needs numba.
"""

from functools import cache

import cv2
import numpy as np

from megatron_keye.data.media.weights import AxisWeights
from megatron_keye.plan.compiled import compile_function

_CHANNELS = 3
_STRIP_ROWS = 128
"""Transposed together: few enough for the second-level cache."""


def resize_height(image: np.ndarray, axis: AxisWeights) -> np.ndarray:
    """uint8 [H, W, 3], contiguous, to uint8 [n, W, 3]."""
    height, width, _ = image.shape
    resized = np.empty((len(axis.first), width * _CHANNELS), np.uint8)
    _kernel()(image.reshape(height, -1), axis.first, axis.counts, axis.weights, axis.bits, 1, resized)
    return resized.reshape(-1, width, _CHANNELS)


def resize_width(image: np.ndarray, axis: AxisWeights) -> np.ndarray:
    """uint8 [H, W, 3], contiguous, to uint8 [H, n, 3]."""
    height, new_width = len(image), len(axis.first)
    rows = image.reshape(height, -1)
    resized = np.empty((height, new_width * _CHANNELS), np.uint8)
    for top in range(0, height, _STRIP_ROWS):
        columns = cv2.transpose(rows[top : top + _STRIP_ROWS])
        new_columns = np.empty((new_width * _CHANNELS, columns.shape[1]), np.uint8)
        _kernel()(columns, axis.first, axis.counts, axis.weights, axis.bits, _CHANNELS, new_columns)
        cv2.transpose(new_columns, resized[top : top + _STRIP_ROWS])
    return resized.reshape(height, new_width, _CHANNELS)


def _weigh_rows(rows, first, counts, weights, bits, channels, out):
    """Every row of `out` is the weighted sum of some `rows`; those of one channel lie `channels` apart. uint8, [n, m] and [k, m]."""
    sums = np.empty(rows.shape[1], np.int32)
    for pixel in range(len(first)):
        for channel in range(channels):
            sums[:] = np.int32(1 << (bits - 1))
            num_fours = counts[pixel] // 4
            for tap in range(0, 4 * num_fours, 4):  # four at a time read and write `sums` a quarter as often
                place = (first[pixel] + tap) * channels + channel
                row0, row1, row2, row3 = rows[place], rows[place + channels], rows[place + 2 * channels], rows[place + 3 * channels]
                weight0, weight1, weight2, weight3 = weights[pixel, tap : tap + 4]
                for column in range(len(sums)):
                    near = weight0 * np.int32(row0[column]) + weight1 * np.int32(row1[column])
                    sums[column] += near + weight2 * np.int32(row2[column]) + weight3 * np.int32(row3[column])
            for tap in range(4 * num_fours, counts[pixel]):
                weight, row = weights[pixel, tap], rows[(first[pixel] + tap) * channels + channel]
                for column in range(len(sums)):
                    sums[column] += weight * np.int32(row[column])
            new_row = out[pixel * channels + channel]
            for column in range(len(sums)):
                value = sums[column] >> np.int32(bits)
                new_row[column] = np.uint8(min(max(value, np.int32(0)), np.int32(255)))


@cache
def _kernel():
    return compile_function(_weigh_rows)
