"""RMSNorm for the decoder's `torch` backend, in the keyword form in which Megatron's layer specs build norms."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, computed in at least float32.

    The weight carries `sequence_parallel`: under sequence parallelism each TP rank normalises other tokens, and
    Megatron sums the gradients of parameters so marked. Without the mark they are silently wrong.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        precise = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + self.eps)
        return (precise * scale).to(x.dtype) * self.weight
