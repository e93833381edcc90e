"""vLLM finds a place for every tensor that is exported: its name map for Keye-VL, written out from its sources (0.10.2 and 0.33.0).

Its own `WeightsMapper`s and modules, taken out of the 0.33.0 wheel, gave the same names and shapes for both 8B models.
"""

import re

import pytest

from megatron_keye.config.load import load_config
from megatron_keye.model.tensors import canonical_shapes

PREFIXES = {"lm_head.": "language_model.lm_head.", "model.": "language_model.model."}
FUSED = {
    ".q_proj.": ".qkv_proj.", ".k_proj.": ".qkv_proj.", ".v_proj.": ".qkv_proj.",
    ".gate_proj.": ".gate_up_proj.", ".up_proj.": ".gate_up_proj.",
}  # fmt: skip
DROPPED = "visual.vision_model.head."
KINDS = ("weight", "bias")
TOWER = {
    "embeddings": ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight", "packing_position_embedding.weight"),
    "layer": ("layer_norm1", "layer_norm2", "self_attn.qkv_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
}
DECODER_LAYER = (
    "input_layernorm", "post_attention_layernorm", "self_attn.qkv_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm",
    "mlp.gate_up_proj", "mlp.down_proj",
)  # fmt: skip


def parameters_of_vllm(model):
    """Names of the parameters of its model, every one of which must be found in a folder."""
    layers = [f"encoder.layers.{n}.{part}.{kind}" for n in range(model.vision.num_layers) for part in TOWER["layer"] for kind in KINDS]
    tower = [*(f"embeddings.{name}" for name in TOWER["embeddings"]), *layers, *(f"post_layernorm.{kind}" for kind in KINDS)]
    decoder = [f"model.layers.{n}.{part}.weight" for n in range(model.decoder.num_layers) for part in DECODER_LAYER]
    outer = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    projector = [f"mlp_AR.{part}.{kind}" for part in ("pre_norm", "linear_1", "linear_2") for kind in KINDS]
    return {*(f"visual.vision_model.{name}" for name in tower), *projector, *(f"language_model.{name}" for name in (*decoder, *outer))}


def vllm_name(name):
    """Where vLLM loads a tensor; None where it drops it."""
    if name.startswith(DROPPED):
        return None
    for old, new in PREFIXES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return re.sub("|".join(map(re.escape, FUSED)), lambda match: FUSED[match[0]], name)


@pytest.mark.parametrize("recipe", ["keye_vl_preview_8b", "keye_vl_1_5_8b", "debug", "debug_preview"])
def test_every_exported_tensor_has_a_place_and_every_place_a_tensor(recipe):
    model = load_config(recipe).model
    names = {vllm_name(name) for name in canonical_shapes(model)} - {None}
    assert names == parameters_of_vllm(model)
