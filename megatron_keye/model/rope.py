"""M-RoPE for the decoder: chunked sections, computed once per packed row for exactly the tokens that this rank holds.

Megatron's own `MultimodalRotaryEmbedding` slices frequencies by whole row while packed (THD) attention splits per document,
so under context parallelism its positions are wrong without an error. Here a token's angle depends on its position
triple alone, and nothing is sliced afterwards.

Shapes: T local tokens, h heads, D head_dim.
"""

import torch
from torch import Tensor


def mrope_cos_sin(positions_3T: Tensor, head_dim: int, base: float, section: tuple[int, int, int], dtype: torch.dtype):
    """cos and sin, each [T, 1, D] in `dtype`, of int positions [3, T] (time, height, width).

    Frequency i of the D / 2 uses the time position for i < section[0], height for the next section[1], width for the rest;
    the halves repeat (rotate-half). Angles are float32, or float64 when `dtype` is: the rule of Qwen2-VL (Keye uses
    [16, 24, 24] of 64).
    """
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    device = positions_3T.device
    exponents = torch.arange(0, head_dim, 2, dtype=precise, device=device) / head_dim
    frequencies = 1.0 / base**exponents
    axis = torch.repeat_interleave(torch.arange(3, device=device), torch.tensor(section, device=device))
    angles = positions_3T.to(precise).T[:, axis] * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_ThD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotate-half (NeoX style) rotation of queries or keys."""
    first, second = x_ThD.chunk(2, dim=-1)
    return x_ThD * cos_T1D + torch.cat((-second, first), dim=-1) * sin_T1D
