"""Pillow's bicubic and torch's antialiased bilinear resize of RGB pixels, to the bit: the first in a fraction of Pillow's time, the second
in about torch's time, but without the second and 200 MB that torch takes to load. Both are compiled for whole rows.

Both libraries weigh the pixels under each output pixel in integers, one axis after the other, and round to uint8 in between; an axis that
keeps its size is left out. So what tells them apart are the weights (`weights.py`) and which axis comes first; the rest is common
(`passes.py`). Without numba the libraries themselves do it, and Pillow also small pictures.

Torch's kernel for uint8 of up to four channels (`upsample_avx_bilinear_bicubic_uint8` of aten/src/ATen/native/cpu/
UpSampleKernelAVXAntialias.h) begins with rows, whatever the shape and layout in memory, and so does the one for CPUs without AVX2
(`upsample_separable_Nd_kernel_impl` of UpSampleKernel.cpp, there). Their weights are int16, at most 22 bits after the point, so sums
stay below 2**31 at any scale: no shape takes another way. Both add half a unit, shift and clamp, as Pillow does.
"""

from collections.abc import Callable

import numpy as np
import PIL
from PIL import Image

from megatron_keye.data.media import torch_resize
from megatron_keye.data.media.passes import resize_height, resize_width
from megatron_keye.data.media.resize import Size
from megatron_keye.data.media.weights import AxisWeights, pillow_bicubic_weights, torch_bilinear_weights
from megatron_keye.plan.compiled import has_numba

_COMPILED_FROM_PIXELS = 1 << 16
"""Pictures below this take Pillow about a millisecond, which does not pay for loading compiled code."""
_TALL_FIRST = int(PIL.__version__.split(".")[0]) >= 13
"""Since version 13 Pillow begins with columns where height shrinks by more than twice what width does, in pixels."""

Weights = Callable[[int, int], AxisWeights]
"""Of an axis, by its length and the new one."""


def resize_bicubic(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [H, W, 3], contiguous, to uint8 [h, w, 3]: the bytes of `Image.resize(..., BICUBIC)` of the installed Pillow."""
    (height, width, _), (new_height, new_width) = image.shape, size
    if max(height * width, new_height * new_width) < _COMPILED_FROM_PIXELS or not has_numba():
        return np.array(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC))
    return _bicubic(image, size)


def resize_bilinear(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [H, W, 3], contiguous, to uint8 [h, w, 3]: the bytes of torch's `interpolate(..., mode="bilinear", antialias=True)`.

    Small pictures are resized here as well: to load torch takes longer than to load the compiled code.
    """
    return _bilinear(image, size) if has_numba() else torch_resize.resize_bilinear(image, size)


def load_compiled() -> None:
    """Load the compiled code, where there is any, before memory is limited or time counts."""
    if has_numba():
        _bilinear(np.zeros((2, 2, 3), np.uint8), (3, 3))


def _bicubic(image: np.ndarray, size: Size) -> np.ndarray:
    (height, width, _), (new_height, new_width) = image.shape, size
    if _TALL_FIRST and height > new_height and height - new_height > 2 * (width - new_width):
        return _to_width(_to_height(image, new_height, pillow_bicubic_weights), new_width, pillow_bicubic_weights)
    return _to_height(_to_width(image, new_width, pillow_bicubic_weights), new_height, pillow_bicubic_weights)


def _bilinear(image: np.ndarray, size: Size) -> np.ndarray:
    new_height, new_width = size
    return _to_height(_to_width(image, new_width, torch_bilinear_weights), new_height, torch_bilinear_weights)


def _to_height(image: np.ndarray, new_height: int, weights: Weights) -> np.ndarray:
    height = image.shape[0]
    return image if height == new_height else resize_height(image, weights(height, new_height))


def _to_width(image: np.ndarray, new_width: int, weights: Weights) -> np.ndarray:
    width = image.shape[1]
    return image if width == new_width else resize_width(image, weights(width, new_width))
