"""The table of canonical names: complete for the released 8B model, the same weights under every tensor-parallel split."""

from collections import Counter
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_keye.config.load import load_config
from megatron_keye.config.schema import DecoderConfig
from megatron_keye.model.encoder import VisualEncoder
from megatron_keye.model.init import fill, proof_tensor
from megatron_keye.model.names import decoder_pieces, encoder_pieces, local_parameters
from megatron_keye.model.tensors import canonical_shapes
from tests.unit.model.one_rank import on_one_rank, whole_decoder

DECODER = DecoderConfig(
    num_layers=3,
    hidden_size=24,
    num_heads=8,
    num_kv_groups=4,
    head_dim=6,
    ffn_hidden_size=20,
    vocab_size=30,
    mrope_section=(1, 1, 1),
)
FIRST_LAYER = 5
"""Number of the chunk's first layer in the whole model, as on a later pipeline stage."""


def local_shapes(tp):
    """Megatron's parameters of a chunk with every part of the decoder, by the shapes of one tensor-parallel rank."""
    d = DECODER
    head_rows = (d.num_heads + 2 * d.num_kv_groups) * d.head_dim // tp
    layer = {
        "input_layernorm.weight": (d.hidden_size,),
        "self_attention.linear_qkv.weight": (head_rows, d.hidden_size),
        "self_attention.q_layernorm.weight": (d.head_dim,),
        "self_attention.k_layernorm.weight": (d.head_dim,),
        "self_attention.linear_proj.weight": (d.hidden_size, d.num_heads * d.head_dim // tp),
        "pre_mlp_layernorm.weight": (d.hidden_size,),
        "mlp.linear_fc1.weight": (2 * d.ffn_hidden_size // tp, d.hidden_size),
        "mlp.linear_fc2.weight": (d.hidden_size, d.ffn_hidden_size // tp),
    }
    vocab_rows = -(-d.vocab_size // tp)
    return {
        "embedding.word_embeddings.weight": (vocab_rows, d.hidden_size),
        **{f"decoder.layers.{number}.{name}": shape for number in range(d.num_layers) for name, shape in layer.items()},
        "decoder.final_layernorm.weight": (d.hidden_size,),
        "output_layer.weight": (vocab_rows, d.hidden_size),
    }


def pieces_of(tensors, tp, tp_rank):
    return list(decoder_pieces(SimpleNamespace(first_layer=FIRST_LAYER), tensors, DECODER, tp, tp_rank))


def filled_ranks(tp):
    """Per rank, the local parameters after every canonical tensor was written to its pieces; unwritten elements are NaN."""
    ranks = []
    for rank in range(tp):
        tensors = {name: torch.full(shape, torch.nan) for name, shape in local_shapes(tp).items()}
        fill(pieces_of(tensors, tp, rank), 1.0, 0, proof_tensor)
        ranks.append(tensors)
    return ranks


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_pieces_tile_the_canonical_tensors_and_read_back(tp):
    whole, covered = {}, {}
    for rank, tensors in enumerate(filled_ranks(tp)):
        for piece in pieces_of(tensors, tp, rank):
            whole.setdefault(piece.name, torch.zeros(piece.full_shape))[piece.index()] = piece.read()
            covered.setdefault(piece.name, torch.zeros(piece.full_shape, dtype=torch.int64))[piece.index()] += 1
    assert len(whole) == 3 + 11 * DECODER.num_layers
    for name, tensor in whole.items():
        assert torch.equal(tensor, proof_tensor(name, tuple(tensor.shape), 1.0, 0)), name
        replicated = "norm" in name
        assert (covered[name] == (tp if replicated else 1)).all(), name


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_pieces_use_every_element_but_padded_vocabulary(tp):
    for rank, tensors in enumerate(filled_ranks(tp)):
        for name, tensor in tensors.items():
            unwritten = tensor.isnan()
            if "embed" in name or "output" in name:
                padded_rows = max(0, (rank + 1) * tensor.shape[0] - DECODER.vocab_size)
                assert unwritten.sum() == padded_rows * DECODER.hidden_size
                assert unwritten[tensor.shape[0] - padded_rows :].all()
            else:
                assert not unwritten.any(), name


@pytest.mark.parametrize("tp", [2, 4])
def test_splits_are_those_of_megatron(tp):
    """linear_qkv is cut by groups, so one rank after another gives the unsplit matrix; linear_fc1 holds [gate; up] on each rank."""
    (one,) = filled_ranks(1)
    ranks = filled_ranks(tp)
    for name, whole in one.items():
        locals_ = [tensors[name] for tensors in ranks]
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            assert torch.equal(torch.cat(locals_, dim=1), whole)
        elif name.endswith("linear_fc1.weight"):
            gates, ups = zip(*(local.chunk(2) for local in locals_), strict=True)
            assert torch.equal(torch.cat([*gates, *ups]), whole)
        elif whole.dim() == 1:
            assert all(torch.equal(local, whole) for local in locals_)
        else:
            assert torch.equal(torch.cat(locals_)[: whole.shape[0]], whole)


def test_layers_count_from_the_chunks_first():
    names = {piece.name for piece in pieces_of(filled_ranks(1)[0], 1, 0)}
    numbers = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
    assert numbers == {FIRST_LAYER, FIRST_LAYER + 1, FIRST_LAYER + 2}


def decoder_shapes(decoder):
    """Canonical names and shapes of a decoder that is built, but whose tensors hold no memory."""
    with FakeTensorMode():
        chunk = whole_decoder(decoder, torch.bfloat16)
        pieces = list(decoder_pieces(chunk, local_parameters(chunk), decoder, 1, 0))
    counts = Counter(piece.name for piece in pieces)
    assert set(counts.values()) == {1}
    return {piece.name: piece.full_shape for piece in pieces}


def encoder_shapes(model):
    with torch.device("meta"):
        encoder = VisualEncoder(model, dtype=torch.bfloat16, attention="sdpa")
    return {piece.name: piece.full_shape for piece in encoder_pieces(local_parameters(encoder))}


@pytest.mark.parametrize(
    ("recipe", "num_parameters", "norm_size"),
    [("keye_vl_preview_8b", 8_696_828_736, 1152), ("keye_vl_1_5_8b", 8_696_828_736 + 2 * (4608 - 1152), 4608)],
)
def test_the_8b_models_have_the_released_tensors(recipe, num_parameters, norm_size):
    model = load_config(recipe).model
    decoder, encoder = on_one_rank(decoder_shapes, model.decoder), encoder_shapes(model)
    assert len(decoder) + len(encoder) == 854
    assert sum(map(prod, [*decoder.values(), *encoder.values()])) == num_parameters
    assert decoder == qwen3_shapes(model.decoder)
    assert canonical_shapes(model) == decoder | encoder
    assert sum(prod(shape) for name, shape in encoder.items() if name.startswith("visual.")) == 465_974_336
    assert encoder["mlp_AR.pre_norm.weight"] == (norm_size,)
    assert encoder["visual.vision_model.embeddings.packing_position_embedding.weight"] == (32768, 1152)
    assert encoder["visual.vision_model.encoder.layers.26.mlp.fc1.weight"] == (4304, 1152)
    assert encoder["mlp_AR.linear_2.weight"] == (4096, 4608)


def qwen3_shapes(decoder):
    """What transformers' Qwen3 calls its tensors, which Keye's folders keep."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        num_hidden_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_groups,
        head_dim=decoder.head_dim,
        intermediate_size=decoder.ffn_hidden_size,
        vocab_size=decoder.vocab_size,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
