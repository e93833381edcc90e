"""The cost model against PyTorch's FLOP counter on models from transformers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from megatron_keye.config.schema import DecoderConfig, ModelConfig, VisionConfig
from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.plan.cost import CostModel, cost_model

VISION = VisionConfig(hidden_size=24, num_layers=3, num_heads=4, ffn_hidden_size=40)
DECODER = DecoderConfig(
    num_layers=3, hidden_size=32, num_heads=4, num_kv_groups=1, head_dim=16, ffn_hidden_size=48, vocab_size=70, mrope_section=(2, 3, 3)
)


def model(freeze=(), recompute="none", vision_recompute=False):
    return ModelConfig(
        variant="keye_vl_1_5",
        vision=VISION.model_copy(update={"recompute": vision_recompute}),
        decoder=DECODER.model_copy(update={"recompute": recompute}),
        freeze=freeze,
    )


def counted_decoder_flops(num_tokens, freeze, recompute):
    torch.manual_seed(0)
    qwen = Qwen3ForCausalLM(
        Qwen3Config(
            num_hidden_layers=DECODER.num_layers,
            hidden_size=DECODER.hidden_size,
            num_attention_heads=DECODER.num_heads,
            num_key_value_heads=DECODER.num_kv_groups,
            head_dim=DECODER.head_dim,
            intermediate_size=DECODER.ffn_hidden_size,
            vocab_size=DECODER.vocab_size,
            tie_word_embeddings=False,
            attn_implementation="eager",
            use_cache=False,
        )
    ).train()
    for name, parameter in qwen.named_parameters():
        parameter.requires_grad_(("embedding" if "embed_tokens" in name else "decoder") not in freeze)
    if recompute == "full":
        qwen.activation_checkpointing_enable({"use_reentrant": True})
    with FlopCounterMode(display=False) as counter:
        logits = qwen(torch.arange(num_tokens)[None]).logits
        if logits.requires_grad:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_tokens", [1, 6, 17])
@pytest.mark.parametrize(
    ("freeze", "recompute"),
    [
        ((), "none"),
        ((), "full"),
        (("decoder",), "none"),
        (("decoder", "vision", "projector", "embedding"), "none"),
    ],
)
def test_decoder_cost_is_what_torch_counts(num_tokens, freeze, recompute):
    cost = cost_model(model(freeze, recompute))
    # Eager attention multiplies the whole square, of which a causal kernel does the pairs up to the diagonal.
    skipped = cost.decoder_pair * (num_tokens * (num_tokens - 1) // 2)
    assert cost.decoder_cost(num_tokens) + skipped == counted_decoder_flops(num_tokens, freeze, recompute)


def counted_vision_flops(side, freeze):
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=VISION.hidden_size,
        num_hidden_layers=VISION.num_layers,
        num_attention_heads=VISION.num_heads,
        intermediate_size=VISION.ffn_hidden_size,
        patch_size=14,
        image_size=14 * side,
        attn_implementation="eager",
    )
    config.vision_use_head = False
    vision = SiglipVisionModel(config).train().requires_grad_("vision" not in freeze)
    merger_config = Qwen3VLVisionConfig(hidden_size=VISION.hidden_size, spatial_merge_size=2, out_hidden_size=DECODER.hidden_size)
    projector = Qwen3VLVisionPatchMerger(merger_config, use_postshuffle_norm=True).requires_grad_("projector" not in freeze)
    with FlopCounterMode(display=False) as counter:
        rows = projector(vision(torch.randn(1, 3, 14 * side, 14 * side)).last_hidden_state[0])
        if rows.requires_grad:
            rows.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("side", [2, 6])
@pytest.mark.parametrize("freeze", [(), ("vision",), ("projector",), ("vision", "projector")])
def test_vision_cost_is_what_torch_counts(side, freeze):
    assert cost_model(model(freeze)).vision_cost(PatchGrid(1, side, side)) == counted_vision_flops(side, freeze)


def test_recomputing_adds_one_forward_pass_of_what_is_recomputed():
    forward = cost_model(model(("vision", "projector", "embedding", "decoder")))
    kept, attention = cost_model(model()), cost_model(model(recompute="core_attention", vision_recompute=True))
    assert attention.decoder_token == kept.decoder_token
    assert attention.decoder_pair - kept.decoder_pair == forward.decoder_pair
    assert attention.vision_pair - kept.vision_pair == forward.vision_pair


grids = st.builds(PatchGrid, st.integers(1, 4), st.integers(1, 30).map(lambda x: 2 * x), st.integers(1, 30).map(lambda x: 2 * x))


@given(st.integers(1, 2**17), grids)
def test_costs_are_integers_that_grow(num_tokens, grid):
    cost = cost_model(model())
    assert type(cost.decoder_cost(num_tokens)) is int
    assert type(cost.vision_cost(grid)) is int
    assert cost.decoder_cost(num_tokens) > cost.decoder_cost(num_tokens - 1)
    assert cost.vision_cost(PatchGrid(grid.t, grid.h + 2, grid.w)) > cost.vision_cost(grid) > 0


def test_frames_cost_less_than_one_clip_of_the_same_patches():
    cost = CostModel(decoder_token=0, decoder_pair=0, vision_patch=1, vision_pair=1, projector_token=4)
    frames = SampleShape(32, tuple(Segment(PatchGrid(1, 4, 4), 0) for _ in range(8)))
    clip = SampleShape(32, (Segment(PatchGrid(8, 4, 4), 0),))
    assert cost.sample_cost(frames).vision == 128 + 8 * 16**2 + 128
    assert cost.sample_cost(clip).vision == 128 + 128**2 + 128


def test_sample_cost_counts_padding_when_told():
    cost = CostModel(decoder_token=10, decoder_pair=1, vision_patch=1, vision_pair=1, projector_token=1)
    assert cost.sample_cost(SampleShape(3)) == (30 + 6, 0)
    assert cost.sample_cost(SampleShape(3), padded_tokens=4) == (40 + 10, 0)
