"""What planning knows of all samples, as arrays: costs of many samples at once.

Attention segments are run-length coded: a video's frames are mostly of one size, so a sample has few runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_keye.contract.media import MERGE, SampleShape
from megatron_keye.errors import PlanError
from megatron_keye.plan.assignment import StepCosts
from megatron_keye.plan.cost import CostModel


@dataclass(frozen=True, slots=True)
class SampleTable:
    """Arrays, which may be memory-mapped. Sample i has `tokens[i]` tokens, and runs first_run[i] .. first_run[i + 1] - 1: a run is
    `run_segments` attention segments of `run_patches` patches each."""

    tokens: np.ndarray
    """int [n]."""
    first_run: np.ndarray
    """int64 [n + 1]."""
    run_patches: np.ndarray
    """int [runs]."""
    run_segments: np.ndarray
    """int [runs]."""

    @classmethod
    def of(cls, shapes: Iterable[SampleShape]) -> "SampleTable":
        """The table of given shapes."""
        tokens, first_run, run_patches, run_segments = [], [0], [], []
        for shape in shapes:
            tokens.append(shape.num_tokens)
            last = None
            for segment in shape.segments:
                if segment.grid.num_patches != last:
                    last = segment.grid.num_patches
                    run_patches.append(last)
                    run_segments.append(0)
                run_segments[-1] += 1
            first_run.append(len(run_patches))
        return cls(*(np.array(column, np.int64) for column in (tokens, first_run, run_patches, run_segments)))

    def step_costs(self, samples: np.ndarray, cost: CostModel, pad_multiple_tokens: int, seq_length_tokens: int) -> StepCosts:
        """Costs of `samples` int64 [n], padded. Raises PlanError when one does not fit a row."""
        tokens = self.tokens[samples].astype(np.int64)
        padded = np.maximum(1, -(-tokens // pad_multiple_tokens)) * pad_multiple_tokens
        too_long = np.flatnonzero(padded > seq_length_tokens)
        if len(too_long):
            first = too_long[0]
            raise PlanError(
                f"Sample {samples[first]} has {tokens[first]} tokens, {padded[first]} with padding to a multiple of "
                f"{pad_multiple_tokens}; a row holds {seq_length_tokens}. Shorten the sample when its index is read, or raise "
                "data.seq_length_tokens."
            )
        patches, vision = self._vision(samples, cost)
        return StepCosts(padded, patches, _decoder_costs(padded, cost), vision)

    def window_costs(self, samples: np.ndarray, cost: CostModel) -> np.ndarray:
        """What each of `samples` int64 [n] costs in all, without padding, int64 [n]: the costs that lookahead divides windows by."""
        return _decoder_costs(self.tokens[samples].astype(np.int64), cost) + self._vision(samples, cost)[1]

    def _vision(self, samples: np.ndarray, cost: CostModel) -> tuple[np.ndarray, np.ndarray]:
        """Patches and ViT cost of each sample, int64 [n] twice."""
        starts = self.first_run[samples]
        counts = self.first_run[samples + 1] - starts
        owner = np.repeat(np.arange(len(samples)), counts)
        runs = np.arange(len(owner)) + np.repeat(starts - np.cumsum(counts) + counts, counts)
        patches, segments = self.run_patches[runs].astype(np.int64), self.run_segments[runs].astype(np.int64)
        each = patches * (cost.vision_patch + cost.vision_pair * patches) + cost.projector_token * (patches // (MERGE * MERGE))
        sums = np.zeros((2, len(samples)), np.int64)
        np.add.at(sums[0], owner, segments * patches)
        np.add.at(sums[1], owner, segments * each)
        return sums[0], sums[1]


def _decoder_costs(tokens: np.ndarray, cost: CostModel) -> np.ndarray:
    return cost.decoder_token * tokens + cost.decoder_pair * (tokens * (tokens + 1) // 2)
