"""Attention of packed patches within their segments, and the choice of the kernel that computes it.

Every kernel takes q, k, v [num_patches, num_heads, head_dim] and the segments they are packed in, and returns an output of the same shape.
It is not causal, knows no mask and scales by head_dim ** -0.5.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_keye.errors import SettingsError
from megatron_keye.model.packed_segments import PackedSegments

CUDA_HEAD_DIM_MULTIPLE = 8
"""flash-attn and torch's varlen attention refuse other head dimensions."""


AttentionKernel = Callable[[Tensor, Tensor, Tensor, PackedSegments], Tensor]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments) -> Tensor:
    """Runs on any device and in any dtype: one batched call for each run of equally long segments."""
    outputs, start = [], 0
    for count, length in segments.runs:
        end = start + count * length
        batch = [x[start:end].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)]
        outputs.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(outputs)


def attention_kernel(name: str, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> AttentionKernel:
    """The kernel called `name` ("auto", "sdpa", "varlen" or "flash") for tensors of this kind.

    "auto" is flash-attn where it is installed and applies, else torch's varlen attention where that applies, else SDPA.
    Raises SettingsError where a named kernel cannot run.
    """
    if name not in ("auto", "sdpa", "varlen", "flash"):
        raise SettingsError(f"kernels.vision_attention is {name!r}; expected auto, sdpa, varlen or flash")
    obstacles = _cuda_obstacles(head_dim, dtype, device)
    if name == "sdpa" or (name == "auto" and obstacles):
        return sdpa_attention
    flash_installed = find_spec("flash_attn") is not None
    if name == "flash" and not flash_installed:
        obstacles.append("flash-attn is not installed")
    if obstacles:
        raise SettingsError(f"kernels.vision_attention is {name}, but {', '.join(obstacles)}; use auto or sdpa")

    from megatron_keye.model import vision_attention_cuda as cuda  # here, as its imports want a CUDA build

    return cuda.varlen_attention if name == "varlen" or not flash_installed else cuda.flash_attention


def _cuda_obstacles(head_dim: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Why the variable-length CUDA kernels cannot serve such tensors."""
    checks = [
        (device.type == "cuda", f"the model is on {device.type}, not on cuda"),
        (dtype in (torch.bfloat16, torch.float16), f"the dtype is {dtype}, not bfloat16 or float16"),
        (head_dim % CUDA_HEAD_DIM_MULTIPLE == 0, f"the head dimension {head_dim} is not a multiple of {CUDA_HEAD_DIM_MULTIPLE}"),
    ]
    return [problem for passed, problem in checks if not passed]
