"""Every tensor of a released model, by canonical name and shape, without building or importing the decoder's library."""

import torch

from megatron_keye.config.schema import DecoderConfig, ModelConfig
from megatron_keye.model.encoder import VisualEncoder

Shape = tuple[int, ...]


def canonical_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The ViT's and projector's tensors, those that are only carried included, then the decoder's from the bottom up.

    Raises SettingsError where the vision settings cannot be built.
    """
    with torch.device("meta"):
        encoder = VisualEncoder(model, dtype=torch.bfloat16, attention="sdpa")
    shapes = {name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()}
    return shapes | decoder_shapes(model.decoder)


def decoder_shapes(decoder: DecoderConfig) -> dict[str, Shape]:
    table = (decoder.vocab_size, decoder.hidden_size)
    layer = _layer_shapes(decoder)
    layers = {f"model.layers.{number}.{name}.weight": shape for number in range(decoder.num_layers) for name, shape in layer.items()}
    return {"model.embed_tokens.weight": table, **layers, "model.norm.weight": (decoder.hidden_size,), "lm_head.weight": table}


def _layer_shapes(decoder: DecoderConfig) -> dict[str, Shape]:
    size, ffn = decoder.hidden_size, decoder.ffn_hidden_size
    query, key = decoder.num_heads * decoder.head_dim, decoder.num_kv_groups * decoder.head_dim
    return {
        "input_layernorm": (size,),
        "self_attn.q_proj": (query, size),
        "self_attn.k_proj": (key, size),
        "self_attn.v_proj": (key, size),
        "self_attn.o_proj": (size, query),
        "self_attn.q_norm": (decoder.head_dim,),
        "self_attn.k_norm": (decoder.head_dim,),
        "post_attention_layernorm": (size,),
        "mlp.gate_proj": (ffn, size),
        "mlp.up_proj": (ffn, size),
        "mlp.down_proj": (size, ffn),
    }
