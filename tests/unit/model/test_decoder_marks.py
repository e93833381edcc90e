"""Marks on parameters that Megatron's gradient norm and reductions go by. A missing one gives wrong numbers and no error."""

from functools import partial

import pytest
import torch

from megatron_keye.config.schema import DecoderConfig, ParallelConfig
from megatron_keye.model.decoder import build_chunk, torch_layer_spec
from megatron_keye.model.decoder_config import megatron_config
from megatron_keye.model.names import LAYER_TABLE, OUTER_TABLE, WHOLE
from megatron_keye.model.norm import RMSNorm
from megatron_keye.parallel.cpu import adapt_to_cpu
from megatron_keye.parallel.grid import RankGrid
from megatron_keye.parallel.groups import build_groups, prepare_megatron
from megatron_keye.parallel.launch import run_ranks

DECODER = DecoderConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_groups=2,
    head_dim=16,
    ffn_hidden_size=48,
    vocab_size=65,
    mrope_section=(2, 3, 3),
)


def marks_at_tp2(sequence_parallel):
    """Per parameter: is it marked as split over TP, and as summed over TP under sequence parallelism."""
    groups = build_groups(RankGrid(tp=2))
    prepare_megatron(groups, seed=0)
    config = megatron_config(DECODER, ParallelConfig(tp=2, sequence_parallel=sequence_parallel), torch.float32)
    chunk = build_chunk(
        config, torch_layer_spec, RMSNorm, pg_collection=groups.decoder, padded_vocab_size=66, max_tokens=64,
        num_layers=2, first_layer=0, is_first=True, is_last=True, vp_stage=None,
    )  # fmt: skip
    marks = {
        name: (vars(p).get("tensor_model_parallel", False), vars(p).get("sequence_parallel", False)) for name, p in chunk.named_parameters()
    }
    return config.qk_layernorm, marks


def split_of(name):
    if name in OUTER_TABLE:
        return OUTER_TABLE[name][0]
    return LAYER_TABLE[name.removeprefix("decoder.layers.").split(".", 1)[1]][0]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_parameter_carries_its_marks(sequence_parallel):
    for qk_layernorm, marks in run_ranks(2, marks_at_tp2, sequence_parallel, prepare=partial(adapt_to_cpu, False)):
        # Without the setting Megatron does not sum the gradients of q and k norms, whose heads differ between TP ranks.
        assert qk_layernorm
        assert len(marks) == 3 + 8 * DECODER.num_layers
        for name, (is_split, is_summed) in marks.items():
            replicated = split_of(name) == WHOLE
            assert is_split == (not replicated), f"{name}: the gradient norm would count it on a wrong number of TP ranks"
            assert is_summed == (replicated and sequence_parallel), f"{name}: its gradient would lack other TP ranks' tokens"
