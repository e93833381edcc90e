"""The decoder on one process: Megatron needs process groups even there, so it lives in a forked rank."""

from functools import partial

from megatron_keye.config.schema import ParallelConfig
from megatron_keye.model.decoder import build_chunk, torch_layer_spec
from megatron_keye.model.decoder_config import megatron_config
from megatron_keye.model.norm import RMSNorm
from megatron_keye.parallel.cpu import adapt_to_cpu
from megatron_keye.parallel.grid import RankGrid
from megatron_keye.parallel.groups import build_groups, prepare_megatron
from megatron_keye.parallel.launch import run_ranks


def on_one_rank(function, *args):
    """The result of function(*args), called in a process of its own that is a world of one rank."""
    return run_ranks(1, function, *args, prepare=partial(adapt_to_cpu, False))[0]


def whole_decoder(decoder, dtype):
    """All layers, embedding and output of `decoder`, on this only rank."""
    groups = build_groups(RankGrid())
    prepare_megatron(groups, seed=0)
    return build_chunk(
        megatron_config(decoder, ParallelConfig(), dtype), torch_layer_spec, RMSNorm, pg_collection=groups.decoder,
        padded_vocab_size=decoder.vocab_size, max_tokens=1024, num_layers=decoder.num_layers, first_layer=0,
        is_first=True, is_last=True, vp_stage=None,
    )  # fmt: skip
