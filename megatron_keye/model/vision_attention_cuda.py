"""Segment attention by variable-length CUDA kernels. Only a GPU can run this file."""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from megatron_keye.model.packed_segments import PackedSegments


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments) -> Tensor:
    """torch's own variable-length flash attention, in bfloat16 or float16."""
    if segments.max_patches == 0:
        return q + k + v  # no rows, but the graph goes on to all three
    bounds, longest = segments.cu_seqlens, segments.max_patches
    return varlen_attn(q, k, v, bounds, bounds, longest, longest)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments) -> Tensor:
    """flash-attn, in bfloat16 or float16. Like the kernel above it repeats bit for bit where torch is asked for determinism."""
    from flash_attn import flash_attn_varlen_func  # an optional dependency

    if segments.max_patches == 0:
        return q + k + v  # no rows, but the graph goes on to all three
    bounds, longest = segments.cu_seqlens, segments.max_patches
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, deterministic=deterministic)
