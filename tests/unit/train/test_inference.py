"""Scores of samples against a forward pass put together by hand, one sample at a time."""

import numpy as np
import torch

from megatron_keye.contract.positions import mrope_positions
from megatron_keye.model.packed import pack_row
from megatron_keye.train.build import build_model
from megatron_keye.train.inference import SAMPLES_AT_ONCE, Blinded, Scorer
from tests.tiny import on_ranks, runtime_here

PAD = 0


def direct_scores(model, tokens, shape, pixels):
    """Log-probability of each supervised token of one unpadded sample, and whether it is the top one."""
    decoder = model.config.model.decoder
    boundaries, positions = [0, shape.num_tokens], mrope_positions(shape, model.config.model.variant)
    row = pack_row(boundaries, positions, decoder, cp_size=1, cp_rank=0, dtype=model.dtype, device=model.device)
    rows, places = torch.zeros(0, decoder.hidden_size, dtype=model.dtype), np.zeros(0, dtype=np.int64)
    if shape.segments:
        rows = model.encoder(torch.from_numpy(np.concatenate(pixels)), [segment.grid for segment in shape.segments])
        starts = zip(shape.visual_starts(), shape.segments, strict=True)
        places = np.concatenate([np.arange(start, start + segment.grid.num_tokens) for start, segment in starts])
    ids = torch.from_numpy(tokens.token_ids.astype(np.int64))
    logits = model.chunks[0](ids[None], rows, torch.from_numpy(places), row).squeeze(0)[:, : decoder.vocab_size]
    at = torch.from_numpy(np.flatnonzero(tokens.supervised))
    logprobs = torch.log_softmax(logits[at - 1].double(), dim=-1)
    return logprobs.gather(1, ids[at, None]).squeeze(1).numpy(), (logprobs.argmax(dim=-1) == ids[at]).numpy()


def score_both(config, tiny, num_samples):
    runtime = runtime_here(config)
    model = build_model(config, runtime.groups, runtime.device)
    dataset = tiny.dataset(config)
    scored = list(Scorer(model, PAD).scores(Several(dataset, num_samples)))
    blind = list(Scorer(model, PAD).scores(Blinded(dataset)))
    with torch.no_grad():
        direct = [direct_scores(model, dataset.tokens(s), dataset.shape(s), dataset.pixels(s)) for s in range(len(dataset))]
        grey = [np.full_like(patches, 128) for patches in dataset.pixels(0)]
        blind_direct = direct_scores(model, dataset.tokens(0), dataset.shape(0), grey)
    return scored, direct, blind[0][1], blind_direct


class Several:
    """`dataset` again and again, as more samples than are scored at once."""

    def __init__(self, dataset, length):
        self._dataset, self._length = dataset, length

    def __len__(self):
        return self._length

    def __getattr__(self, name):
        return lambda sample: getattr(self._dataset, name)(sample % len(self._dataset))


def test_scores_are_those_of_a_direct_forward_in_the_order_of_the_samples(tiny):
    """In float64, over the edge between two rounds of scoring; and grey pixels where blinded."""
    config = tiny.config("train.precision=fp64", "model.init_std=0.08", "encode.patches_per_round=90")
    num_samples = SAMPLES_AT_ONCE + 8
    ((scored, direct, blind, blind_direct),) = on_ranks("one", config, score_both, tiny, num_samples)
    assert [sample for sample, _ in scored] == list(range(num_samples))
    for sample, score in scored:
        logprobs, is_top = direct[sample % len(direct)]
        assert score.logprobs.dtype == np.float32
        np.testing.assert_allclose(score.logprobs, logprobs, rtol=1e-6)
        np.testing.assert_array_equal(score.is_top, is_top)
    np.testing.assert_allclose(blind.logprobs, blind_direct[0], rtol=1e-6)
    assert not np.allclose(blind.logprobs, direct[0][0], rtol=1e-6)
