"""Pixels to patches, in the order that the ViT's weights expect."""

import numpy as np

from megatron_keye.contract.media import PATCH_PIXELS, PATCH_VALUES, TOKEN_PIXELS


def patchify(frames: np.ndarray) -> np.ndarray:
    """uint8 [t, H, W, 3] to uint8 [t * gh * gw, 588]: frames in time order, patches row by row, (c, row, column) inside.

    gh = H / 14 and gw = W / 14, both even. Raises ValueError for another shape or dtype.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"found frames of dtype {frames.dtype} and shape {frames.shape}; expected uint8 [t, H, W, 3]")
    t, height, width, channels = frames.shape
    if height % TOKEN_PIXELS or width % TOKEN_PIXELS:
        raise ValueError(f"found frames of {height}x{width} pixels; expected multiples of {TOKEN_PIXELS}: resize first")
    blocks = frames.reshape(t, height // PATCH_PIXELS, PATCH_PIXELS, width // PATCH_PIXELS, PATCH_PIXELS, channels)
    return blocks.transpose(0, 1, 3, 5, 2, 4).reshape(-1, PATCH_VALUES)
