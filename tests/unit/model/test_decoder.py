"""The decoder against transformers' Qwen3 with Qwen2.5-VL's rotary embedding, and packed rows against documents run alone."""

import numpy as np
import pytest
import torch
from torch import nn

from megatron_keye.config.schema import DecoderConfig
from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.model.init import fill, proof_tensor
from megatron_keye.model.names import decoder_pieces, local_parameters
from megatron_keye.model.packed import pack_row
from megatron_keye.model.rope import mrope_cos_sin, rotate
from megatron_keye.plan.positions import row_positions
from megatron_keye.plan.types import Document, Row
from tests.unit.model.one_rank import on_one_rank, whole_decoder

DECODER = DecoderConfig(
    num_layers=3,
    hidden_size=96,
    num_heads=6,
    num_kv_groups=2,
    head_dim=32,
    ffn_hidden_size=160,
    vocab_size=131,
    rope_base=8e6,
    mrope_section=(4, 6, 6),
)
WEIGHT_STD, WEIGHT_SEED = 0.1, 3
SHAPES = (
    SampleShape(29, (Segment(PatchGrid(1, 4, 8), 3), Segment(PatchGrid(1, 6, 2), 0))),
    SampleShape(7),
    SampleShape(41, (Segment(PatchGrid(3, 4, 6), 11, ticks_per_frame=2.0),)),
)


def packed_row(shapes):
    documents, start = [], 0
    for sample, shape in enumerate(shapes):
        padded_tokens = -(-shape.num_tokens // 8) * 8
        documents.append(Document(sample, shape, start, padded_tokens))
        start += padded_tokens
    return Row(tuple(documents), start)


def row_inputs(row):
    """Token ids, places of visual tokens and the visual rows there, from each document's own random numbers."""
    token_ids = torch.zeros(row.num_tokens, dtype=torch.int64)
    places, visual = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, DECODER.hidden_size)]
    for document in row.documents:
        generator = torch.Generator().manual_seed(document.shape.num_tokens)
        count = document.shape.num_tokens
        token_ids[document.start : document.start + count] = torch.randint(0, DECODER.vocab_size, (count,), generator=generator)
        for start, segment in zip(document.shape.visual_starts(), document.shape.segments, strict=True):
            places.append(document.start + start + torch.arange(segment.grid.num_tokens))
            visual.append(torch.randn(segment.grid.num_tokens, DECODER.hidden_size, generator=generator))
    return token_ids, torch.cat(places), torch.cat(visual)


def logit_weights(row):
    """A random number for every logit of a real token, zero in padding: what gradients are taken of."""
    weights = torch.zeros(row.num_tokens, DECODER.vocab_size)
    for document in row.documents:
        own = torch.Generator().manual_seed(1000 + document.shape.num_tokens)
        weights[document.start : document.start + document.shape.num_tokens] = torch.randn(
            document.shape.num_tokens, DECODER.vocab_size, generator=own
        )
    return weights


def our_results(shapes):
    """Logits [row tokens, V] of a packed row, and gradients by canonical name and of the visual rows."""
    chunk = whole_decoder(DECODER, torch.float32)
    fill(decoder_pieces(chunk, local_parameters(chunk), DECODER, 1, 0), WEIGHT_STD, WEIGHT_SEED, proof_tensor)
    row = packed_row(shapes)
    token_ids, places, visual = row_inputs(row)
    packing = pack_row(
        row.cu_seqlens, row_positions(row, "keye_vl_preview"), DECODER, cp_size=1, cp_rank=0,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    visual.requires_grad_()
    logits = chunk(token_ids[None], visual, places, packing).squeeze(0)
    (logits * logit_weights(row)).sum().backward()
    pieces = decoder_pieces(chunk, {name: p.grad for name, p in chunk.named_parameters()}, DECODER, 1, 0)
    gradients = {piece.name: piece.read().clone() for piece in pieces}
    return logits.detach(), gradients | {"visual rows": visual.grad}


@pytest.fixture(scope="module")
def ours():
    return on_one_rank(our_results, SHAPES)


@pytest.fixture(scope="module")
def oracle():
    return qwen3()


class ChunkedRotary(nn.Module):
    """Qwen2.5-VL's cos and sin for positions [3, 1, T] that were set before the call, whatever the caller asks for."""

    def __init__(self, decoder):
        super().__init__()
        self.rotary = qwen2_5_vl_rotary(decoder)
        self.positions = None

    def forward(self, x, position_ids):
        return self.rotary(x, self.positions)


def qwen2_5_vl_rotary(decoder):
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    config = modeling.Qwen2_5_VLTextConfig(
        hidden_size=decoder.hidden_size,
        num_attention_heads=decoder.num_heads,
        head_dim=decoder.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_base, "mrope_section": list(decoder.mrope_section)},
    )
    config.head_dim = decoder.head_dim
    return modeling.Qwen2_5_VLRotaryEmbedding(config)


def qwen3_config(decoder):
    return pytest.importorskip("transformers").Qwen3Config(
        num_hidden_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_groups,
        head_dim=decoder.head_dim,
        intermediate_size=decoder.ffn_hidden_size,
        vocab_size=decoder.vocab_size,
        rms_norm_eps=decoder.norm_eps,
        tie_word_embeddings=False,
        attention_bias=False,
    )


def qwen3():
    """Qwen3 with the same weights, found by canonical name; a name or shape of ours that it lacks is an error."""
    model = pytest.importorskip("transformers").Qwen3ForCausalLM(qwen3_config(DECODER)).float()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights = {name: proof_tensor(name, shape, WEIGHT_STD, WEIGHT_SEED) for name, shape in shapes.items()}
    model.load_state_dict(weights, strict=True)
    model.model.rotary_emb = ChunkedRotary(DECODER)
    return model


def oracle_results(model, shapes):
    """What our_results returns, from Qwen3, one document after another and without padding."""
    row = packed_row(shapes)
    token_ids, places, visual = row_inputs(row)
    visual.requires_grad_()
    logits = torch.zeros(row.num_tokens, DECODER.vocab_size)
    positions = torch.from_numpy(row_positions(row, "keye_vl_preview"))
    embeddings = model.model.embed_tokens(token_ids).index_copy(0, places, visual)
    model.zero_grad()
    for document in row.documents:
        own = slice(document.start, document.start + document.shape.num_tokens)
        model.model.rotary_emb.positions = positions[:, None, own]
        logits[own] = model(inputs_embeds=embeddings[None, own]).logits[0]
    (logits * logit_weights(row)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), gradients | {"visual rows": visual.grad}


def real_tokens(row):
    return torch.cat([torch.arange(d.start, d.start + d.shape.num_tokens) for d in row.documents])


def in_one(ours, theirs):
    """Both sides' tensors as one each, every tensor in units of the largest element of theirs."""
    scale = {name: tensor.abs().max() for name, tensor in theirs.items()}
    return [torch.cat([(side[name] / scale[name]).flatten() for name in theirs]) for side in (ours, theirs)]


def test_logits_equal_qwen3(ours, oracle, parity):
    real = real_tokens(packed_row(SHAPES))
    parity("decoder", ours[0][real], oracle_results(oracle, SHAPES)[0][real])


def test_gradients_equal_qwen3(ours, oracle, parity):
    _, expected = oracle_results(oracle, SHAPES)
    assert ours[1].keys() == expected.keys()
    parity("decoder gradients", *in_one(ours[1], expected))


def test_a_packed_row_equals_its_documents_alone(ours, parity):
    alone = [on_one_rank(our_results, (shape,)) for shape in SHAPES]
    for document, (logits, _) in zip(packed_row(SHAPES).documents, alone, strict=True):
        parity("packed row", ours[0][document.start : document.start + document.padded_tokens], logits)
    weights = ours[1].keys() - {"visual rows"}
    expected = {name: sum(gradients[name] for _, gradients in alone) for name in weights}
    parity("packed row gradients", *in_one({name: ours[1][name] for name in weights}, expected))


@pytest.mark.parametrize(
    ("head_dim", "section", "base"), [(128, (16, 24, 24), 1e6), (128, (16, 24, 24), 8e6), (16, (2, 3, 3), 1e6), (32, (4, 6, 6), 8e6)]
)
def test_rotary_numbers_equal_qwen2_5_vl(head_dim, section, base, parity):
    decoder = DECODER.model_copy(update={"head_dim": head_dim, "mrope_section": section, "rope_base": base})
    positions = np.random.default_rng(0).integers(0, 40_000, (3, 500))
    cos, sin = mrope_cos_sin(torch.from_numpy(positions), head_dim, base, section, torch.float32)
    theirs = qwen2_5_vl_rotary(decoder)(torch.zeros(1), torch.from_numpy(positions)[:, None])
    for name, a, b in zip(("cos", "sin"), (cos, sin), theirs, strict=True):
        # Equal float32 angles; cos and sin of them may differ in the last bit where vector code takes another path.
        parity(f"m-rope {name}", a.squeeze(1), b.squeeze(0), tolerance=2e-7)


def test_rotation_equals_qwen3(parity):
    modeling = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(50, 6, 32, generator=generator), torch.randn(50, 2, 32, generator=generator)
    cos, sin = mrope_cos_sin(torch.arange(50).expand(3, 50), 32, 1e4, (4, 6, 6), torch.float32)
    batched = (queries.transpose(0, 1)[None], keys.transpose(0, 1)[None], cos.squeeze(1)[None], sin.squeeze(1)[None])
    for ours, theirs in zip((queries, keys), modeling.apply_rotary_pos_emb(*batched), strict=True):
        parity("rotation", rotate(ours, cos, sin), theirs[0].transpose(0, 1), tolerance=0.0)
