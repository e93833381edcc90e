"""Core attention of the decoder's `torch` backend: packed documents, causal within each, with context parallelism.

Megatron builds it through the layer spec and calls it after q/k norms. It rotates queries and keys (M-RoPE), gathers keys
and values over the CP ranks, and runs scaled dot-product attention per document.

Shapes: T local tokens, S row tokens, h query heads, g key/value heads, D head_dim.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_keye.model.packed import PackedRow
from megatron_keye.model.rope import rotate


class PackedAttention(MegatronModule):
    """Causal attention per document of a packed row; query tokens are local, keys and values of the whole row."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type, attention_type: str, *,
        pg_collection, softmax_scale: float | None = None, attention_dropout: float | None = None, cp_comm_type: str | None = None,
    ):  # fmt: skip
        super().__init__(config=config)
        self.cp = pg_collection.cp
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *,
        attn_mask_type=None, attention_bias=None, packed_seq_params: PackedRow,
    ) -> Tensor:  # fmt: skip
        """query [T, 1, h, D], key and value [T, 1, g, D] -> [T, 1, h * D]."""
        row = packed_seq_params
        q_ThD = rotate(query.squeeze(1), row.cos, row.sin)
        k_SgD = rotate(key.squeeze(1), row.cos, row.sin)
        v_SgD = value.squeeze(1)
        if self.cp.size() > 1:
            k_SgD = _GatherTokens.apply(k_SgD, self.cp)[row.row_order]
            v_SgD = _GatherTokens.apply(v_SgD, self.cp)[row.row_order]
        out_ThD = attend(q_ThD, k_SgD, v_SgD, row.boundaries, self.cp.size(), self.cp.rank(), self.scale)
        return out_ThD.flatten(1).unsqueeze(1)


def attend(
    q_ThD: Tensor, k_SgD: Tensor, v_SgD: Tensor, boundaries: tuple[int, ...], cp_size: int, cp_rank: int, scale: float
) -> Tensor:
    """Attention of one CP rank's queries, in zigzag order, to the keys of the whole row, in row order.

    A rank holds two chunks of each document (one whole document without context parallelism); a chunk attends to its
    document's keys up to its own end.
    """
    parts = (cp_rank, 2 * cp_size - 1 - cp_rank) if cp_size > 1 else (0,)
    chunks_per_document = 2 * cp_size if cp_size > 1 else 1
    pieces, at = [], 0
    for start, end in pairwise(boundaries):
        chunk = (end - start) // chunks_per_document
        for part in parts:
            keys_end = start + (part + 1) * chunk
            pieces.append(_causal(q_ThD[at : at + chunk], k_SgD[start:keys_end], v_SgD[start:keys_end], scale))
            at += chunk
    return torch.cat(pieces)


def _causal(q_nhD: Tensor, k_mgD: Tensor, v_mgD: Tensor, scale: float) -> Tensor:
    """Causal attention where the last query stands at the last key: [n, h, D]."""
    num_queries, num_keys = q_nhD.shape[0], k_mgD.shape[0]
    mask = None
    if num_queries != num_keys:
        key_at = torch.arange(num_keys, device=q_nhD.device)
        query_at = torch.arange(num_keys - num_queries, num_keys, device=q_nhD.device)
        mask = key_at <= query_at[:, None]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_nhD, k_mgD, v_mgD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


class _GatherTokens(torch.autograd.Function):
    """All-gather along tokens; the gradient is reduce-scattered back to the owners."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor):
        mine = gradient.new_empty((gradient.shape[0] // ctx.group.size(), *gradient.shape[1:]))
        dist.reduce_scatter_tensor(mine, gradient.contiguous(), group=ctx.group)
        return mine, None
