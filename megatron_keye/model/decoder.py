"""The Qwen3 decoder on Megatron's GPTModel: one chunk of it, which takes token ids and visual rows.

Shapes: T tokens that this CP rank holds of a row (T / TP where sequence parallelism slices them), H hidden size,
V vocabulary rows that this TP rank holds.
"""

from collections.abc import Callable

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_keye.model.attention import PackedAttention
from megatron_keye.model.norm import RMSNorm
from megatron_keye.model.packed import PackedRow


class KeyeDecoder(GPTModel):
    """A pipeline chunk of the decoder. `first_layer` is the number of its first layer in the whole model."""

    def __init__(self, *args, first_layer: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.first_layer = first_layer

    def forward(self, token_ids: Tensor | None, visual_rows: Tensor | None, visual_places: Tensor | None, row: PackedRow) -> Tensor:
        """Logits [1, T, V] on the last stage, else hidden states [T, 1, H].

        On the first stage, token ids int64 [1, T] are embedded and the rows `visual_rows` [n, H] replace the embeddings at
        local places `visual_places` int64 [n]; other stages get None and read their input from the pipeline.
        """
        decoder_input = None
        if self.pre_process:
            decoder_input = self.embedding(input_ids=token_ids, position_ids=None)
            decoder_input = decoder_input.index_copy(0, visual_places, visual_rows.unsqueeze(1))
            if not decoder_input.requires_grad:
                # With everything before it frozen, full recompute would see no input that needs a gradient and
                # would leave the first stage untrained without an error.
                decoder_input.requires_grad_()
        return super().forward(token_ids, None, None, decoder_input=decoder_input, packed_seq_params=row)


def build_chunk(
    config: TransformerConfig, layer_spec: Callable[[], ModuleSpec], final_norm: type, *, pg_collection,
    padded_vocab_size: int, max_tokens: int, num_layers: int, first_layer: int, is_first: bool, is_last: bool, vp_stage: int | None,
) -> KeyeDecoder:  # fmt: skip
    """One chunk with `num_layers` layers; `is_first` adds the embedding, `is_last` the final norm and output layer."""
    layers = TransformerBlockSubmodules(layer_specs=[layer_spec() for _ in range(num_layers)], layer_norm=final_norm)
    return KeyeDecoder(
        config, layers, vocab_size=padded_vocab_size, max_sequence_length=max_tokens, pre_process=is_first, post_process=is_last,
        position_embedding_type="none", pg_collection=pg_collection, vp_stage=vp_stage, first_layer=first_layer,
    )  # fmt: skip


def torch_layer_spec() -> ModuleSpec:
    """A decoder layer of plain torch modules: Megatron's local spec with our norms and core attention."""
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    attention.q_layernorm = RMSNorm
    attention.k_layernorm = RMSNorm
    return spec


