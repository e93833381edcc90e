"""Per-token log-probabilities of given samples, on one process: what scoring and evaluation share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch

from megatron_keye.contract.media import SampleShape
from megatron_keye.contract.rows import next_tokens
from megatron_keye.data.delivery import within_one_rank
from megatron_keye.data.loader import ReplicaLoader
from megatron_keye.data.sources import ThreadSource
from megatron_keye.data.tokenize import TokenizedSample
from megatron_keye.model.encode import EncodePhases
from megatron_keye.objective.cross_entropy import token_nll
from megatron_keye.train.batch import Microbatch, fill, lay_out
from megatron_keye.train.build import KeyeModel
from megatron_keye.train.placement import Planner

SAMPLES_AT_ONCE = 32


class Samples(Protocol):
    """Numbered samples: a `Dataset`, or anything that offers the same three methods."""

    def __len__(self) -> int: ...

    def shape(self, sample: int) -> SampleShape: ...

    def tokens(self, sample: int) -> TokenizedSample: ...

    def pixels(self, sample: int) -> list[np.ndarray]: ...

    def sample_id(self, sample: int) -> str: ...


@dataclass(frozen=True)
class SampleScore:
    """float32 log-probabilities of a sample's supervised tokens in order, and whether each is the most probable one."""

    logprobs: np.ndarray
    is_top: np.ndarray


class Blinded:
    """The same samples with grey pixels: what can be answered without looking."""

    def __init__(self, samples: Samples):
        self._samples = samples
        self.shape, self.tokens, self.sample_id = samples.shape, samples.tokens, samples.sample_id

    def __len__(self) -> int:
        return len(self._samples)

    def pixels(self, sample: int) -> list[np.ndarray]:
        return [np.full_like(patches, 128) for patches in self._samples.pixels(sample)]


class Scorer:
    """Runs a whole model (one process, no pipeline) forward only."""

    def __init__(self, model: KeyeModel, pad_id: int):
        self._model = model
        self._pad_id = pad_id
        self._planner = Planner(model.config, num_replicas=1)
        self._encode = EncodePhases(
            model.encoder, model.groups.replica, hidden_size=model.config.model.decoder.hidden_size, dtype=model.dtype,
            trainable=False, keep_graph=False, lap=lambda phase: None,
        )  # fmt: skip
        for module in (model.encoder, *model.chunks):
            module.eval()

    def scores(self, samples: Samples) -> Iterator[tuple[int, SampleScore]]:
        """(sample, score) of every sample, in order. Raises DataError for a sample that cannot be read."""
        numbers = iter(range(len(samples)))
        source = ThreadSource(samples, self._model.config.data.decode_threads)
        loader = ReplicaLoader(source, pad_id=self._pad_id, skip_bad=False)
        try:
            while members := tuple(islice(numbers, SAMPLES_AT_ONCE)):
                found = self._score(members, samples, loader)
                yield from ((sample, found[sample]) for sample in members)
        finally:
            loader.close()

    @torch.no_grad()
    def _score(self, members: Sequence[int], samples: Samples, loader: ReplicaLoader) -> dict[int, SampleScore]:
        (replica,) = self._planner.place(members, [samples.shape(sample) for sample in members])
        data = loader.load(replica)
        model = self._model
        layout = lay_out(replica, model.config, model.groups, model.device)
        batch = fill(layout, *within_one_rank(data, replica), num_supervised=0, device=model.device)
        slab = self._encode.forward(batch.rounds, batch.route, model.device)
        scores = {}
        for row, tokens, microbatch, visual in zip(
            replica.rows, data.rows, batch.microbatches, slab.split(list(batch.route.slab_counts)), strict=True
        ):
            logprobs, is_top = self._row_scores(microbatch, visual)
            wanted = next_tokens(tokens, row.cu_seqlens)[1]
            for document in row.documents:
                own = slice(document.start, document.start + document.padded_tokens)
                picked = wanted[own]
                scores[document.sample] = SampleScore(logprobs[own][picked], is_top[own][picked])
        return scores

    def _row_scores(self, microbatch: Microbatch, visual: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Of the label of every token of a row: its log-probability, float32, and whether it is the most probable one."""
        model = self._model
        vocab_size = model.config.model.decoder.vocab_size
        logits = model.chunks[0](microbatch.token_ids, visual, microbatch.visual_places, microbatch.row).squeeze(0)
        logprobs = -token_nll(logits, microbatch.labels, vocab_size, model.groups.tp)
        is_top = logits[:, :vocab_size].argmax(dim=-1) == microbatch.labels
        # On CPU a float64 model stays float64 through `.float()`.
        return logprobs.float().cpu().numpy().astype(np.float32, copy=False), is_top.cpu().numpy()
