"""What attention needs to know about one packed row on one rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_keye.config.schema import DecoderConfig
from megatron_keye.model.rope import mrope_cos_sin
from megatron_keye.plan.context_split import gathered_order, local_tokens


@dataclass
class PackedRow(PackedSeqParams):
    """Travels through Megatron's layers as `packed_seq_params`.

    `qkv_format` stays `sbhd`, so Megatron neither slices nor rotates: positions and packing are applied by our core
    attention, from `cos`, `sin` ([T_local, 1, head_dim]) and `boundaries` (of the padded documents of the whole row).
    `row_order` puts keys and values gathered over the CP ranks into row order; None without context parallelism.
    """

    boundaries: tuple[int, ...] = ()
    row_order: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


def pack_row(
    boundaries: Sequence[int], positions_3T: np.ndarray, decoder: DecoderConfig, *,
    cp_size: int, cp_rank: int, dtype: torch.dtype, device: torch.device,
) -> PackedRow:  # fmt: skip
    """The packing of a row with document `boundaries` and int64 M-RoPE `positions_3T` [3, row tokens] on one CP rank."""
    mine = local_tokens(boundaries, cp_size, cp_rank)
    positions = torch.from_numpy(positions_3T[:, mine]).to(device)
    cos, sin = mrope_cos_sin(positions, decoder.head_dim, decoder.rope_base, decoder.mrope_section, dtype)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in pairwise(boundaries))
    order = None
    if cp_size > 1:
        order = torch.from_numpy(gathered_order(boundaries, cp_size)).to(device)
    return PackedRow(
        qkv_format="sbhd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest,
        boundaries=tuple(boundaries), row_order=order, cos=cos, sin=sin,
    )  # fmt: skip
