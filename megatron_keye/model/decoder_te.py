"""The decoder's Transformer Engine backend. Only a GPU with Transformer Engine can run this file."""

from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_keye.model.packed import PackedRow
from megatron_keye.model.rope import rotate

TE_NORM = TENorm


class RotatedTEAttention(TEDotProductAttention):
    """TE's packed (THD) attention, with context parallelism of its own, behind our M-RoPE.

    Megatron's layers see an `sbhd` row, so that they neither slice nor rotate it; TE gets the same tokens as THD.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, attn_mask_type=None, attention_bias=None,
        packed_seq_params: PackedRow | None = None, num_splits: int | None = None,
    ) -> Tensor:  # fmt: skip
        """query [T, 1, h, D], key and value [T, 1, g, D] -> [T, 1, h * D]."""
        row = packed_seq_params
        q_ThD = rotate(query.squeeze(1), row.cos, row.sin)
        k_TgD = rotate(key.squeeze(1), row.cos, row.sin)
        packing = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=row.cu_seqlens_q, cu_seqlens_kv=row.cu_seqlens_kv,
            max_seqlen_q=row.max_seqlen_q, max_seqlen_kv=row.max_seqlen_kv,
        )  # fmt: skip
        mask_type = AttnMaskType.padding_causal
        out = super().forward(q_ThD, k_TgD, value.squeeze(1), None, attn_mask_type=mask_type, packed_seq_params=packing)
        return out.reshape(out.shape[0], 1, -1)


def te_layer_spec() -> ModuleSpec:
    """A decoder layer of TE modules: Megatron's spec with our core attention."""
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    spec.submodules.self_attention.submodules.core_attention = RotatedTEAttention
    return spec
