"""Multimodal rotary (M-RoPE) position ids of one sample, for both variants."""

import numpy as np

from megatron_keye.config.schema import Variant
from megatron_keye.contract.media import MERGE, SampleShape, Segment


def mrope_positions(shape: SampleShape, variant: Variant) -> np.ndarray:
    """Positions of a sample's tokens on the (time, height, width) axes: int64 [3, num_tokens].

    Text advances all axes by one per token. A visual segment that starts at position p covers p + time, p + row and
    p + column of the merged grid, rows first; the next token is one past the largest id on any axis. Time is 0 for images
    and for the frames of Keye-VL-1.5, where each frame is a segment of its own and time is told in text. In a Preview clip,
    time is trunc(k * ticks_per_frame) for frame k, computed in float32 as the released model does.
    Raises ValueError for a Keye-VL-1.5 segment with more than one frame, or segments that do not fit in the sample.
    """
    _check(shape, variant)
    positions = np.empty((3, shape.num_tokens), dtype=np.int64)
    token, position = 0, 0
    for segment in shape.segments:
        token, position = _write_text(positions, token, segment.gap_tokens, position)
        block = _block(segment)
        positions[:, token : token + block.shape[1]] = position + block
        token += block.shape[1]
        position += int(block.max()) + 1
    _write_text(positions, token, shape.num_tokens - token, position)
    return positions


def _write_text(positions: np.ndarray, token: int, count: int, position: int) -> tuple[int, int]:
    positions[:, token : token + count] = np.arange(position, position + count)
    return token + count, position + count


def _block(segment: Segment) -> np.ndarray:
    """Positions of one segment's tokens relative to its start: int64 [3, num_tokens]."""
    grid = segment.grid
    block = np.indices((grid.t, grid.h // MERGE, grid.w // MERGE), dtype=np.int64).reshape(3, -1)
    frame_time = np.arange(grid.t, dtype=np.float32) * np.float32(segment.ticks_per_frame)
    block[0] = frame_time.astype(np.int64)[block[0]]
    return block


def _check(shape: SampleShape, variant: Variant) -> None:
    used = shape.num_visual_tokens + sum(s.gap_tokens for s in shape.segments)
    if used > shape.num_tokens:
        raise ValueError(f"segments and the text between them take {used} tokens, but the sample has {shape.num_tokens}")
    if variant == "keye_vl_1_5":
        for index, segment in enumerate(shape.segments):
            if segment.grid.t != 1:
                raise ValueError(f"segment {index} has {segment.grid.t} frames; {variant} has one segment per frame")
