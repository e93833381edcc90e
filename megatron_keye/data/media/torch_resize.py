"""What torch itself resizes: all of Preview's clips, whose kernel is in float32, and those of Keye-VL-1.5 where numba is missing.

Torch takes a second and 200 MB to load, so it is loaded by the first resize that needs it.
"""

from functools import cache
from types import ModuleType

import numpy as np

from megatron_keye.data.limits import lifted_memory_limit
from megatron_keye.data.media.resize import Size


def resize_bilinear(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [h, w, 3] by torch's antialiased bilinear kernel for uint8."""
    torch = _torch()
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # numpy's image[None] has a stride that takes torch's slow path
    resized = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())[0]


def resize_bicubic(frames: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [n, H, W, 3] to uint8 [n, h, w, 3] by torch's antialiased bicubic kernel in float32, clamped and rounded: what torchvision
    does with a uint8 tensor."""
    torch = _torch()
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


@cache
def _torch() -> ModuleType:
    with lifted_memory_limit():
        import torch
    return torch
