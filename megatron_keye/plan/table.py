"""What planning knows of all samples, as arrays: costs of many samples at once.

Attention segments are run-length coded: a video's frames are mostly of one size, so a sample has few runs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from megatron_keye.contract.media import MERGE, SampleShape
from megatron_keye.errors import PlanError
from megatron_keye.plan.assignment import StepCosts
from megatron_keye.plan.cost import CostModel


@dataclass(frozen=True, slots=True)
class SampleTable:
    """Arrays, which may be memory-mapped. Sample i has `tokens[i]` tokens, and `num_runs[i]` runs from `first_run[i]` on: a run is
    `run_segments` attention segments of `run_patches` patches each."""

    tokens: np.ndarray
    """int [n]."""
    first_run: np.ndarray
    """int64 [n]."""
    num_runs: np.ndarray
    """int [n]."""
    run_patches: np.ndarray
    """int [runs]."""
    run_segments: np.ndarray
    """int [runs]."""

    @classmethod
    def of(cls, shapes: Iterable[SampleShape]) -> "SampleTable":
        """The table of given shapes."""
        tokens, first_run, num_runs, runs = [], [], [], []
        for shape in shapes:
            own = segment_runs(shape)
            tokens.append(shape.num_tokens)
            first_run.append(len(runs))
            num_runs.append(len(own))
            runs += own
        patches, segments = zip(*runs, strict=True) if runs else ((), ())
        return cls(*(np.array(column, np.int64) for column in (tokens, first_run, num_runs, patches, segments)))

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def concatenated(cls, tables: Sequence["SampleTable"]) -> "SampleTable":
        """The samples of several tables, one table after another."""
        runs_before = np.cumsum([0, *(len(table.run_patches) for table in tables)])
        first_run = [table.first_run + before for table, before in zip(tables, runs_before, strict=False)]
        columns = ("tokens", "num_runs", "run_patches", "run_segments")
        merged = {name: np.concatenate([getattr(table, name) for table in tables]) for name in columns}
        return cls(first_run=np.concatenate(first_run), **merged)

    def with_samples(self, samples: np.ndarray, shapes: Iterable[SampleShape]) -> "SampleTable":
        """The table in which `samples` int64 [m] have other `shapes`."""
        other = SampleTable.of(shapes)
        tokens, first_run, num_runs = (np.array(column, np.int64) for column in (self.tokens, self.first_run, self.num_runs))
        tokens[samples], first_run[samples], num_runs[samples] = other.tokens, other.first_run + len(self.run_patches), other.num_runs
        run_patches, run_segments = (
            np.concatenate([own, added])
            for own, added in ((self.run_patches, other.run_patches), (self.run_segments, other.run_segments))
        )
        return SampleTable(tokens, first_run, num_runs, run_patches, run_segments)

    def taking(self, samples: np.ndarray) -> "SampleTable":
        """The table of `samples` int64 [m] alone, in their order. Shares the runs."""
        return replace(self, tokens=self.tokens[samples], first_run=self.first_run[samples], num_runs=self.num_runs[samples])

    def visual_tokens(self) -> np.ndarray:
        """int64 [n]: of every sample."""
        tokens_before = np.concatenate([[0], np.cumsum(self.run_patches.astype(np.int64) * self.run_segments)]) // (MERGE * MERGE)
        return tokens_before[self.first_run + self.num_runs] - tokens_before[self.first_run]

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
        starts, counts = self.first_run[samples].astype(np.int64), self.num_runs[samples].astype(np.int64)
        owner = np.repeat(np.arange(len(samples)), counts)
        runs = np.arange(len(owner)) + np.repeat(starts - np.cumsum(counts) + counts, counts)
        patches, segments = self.run_patches[runs].astype(np.int64), self.run_segments[runs].astype(np.int64)
        each = patches * (cost.vision_patch + cost.vision_pair * patches) + cost.projector_token * (patches // (MERGE * MERGE))
        each += cost.vision_segment
        sums = np.zeros((2, len(samples)), np.int64)
        np.add.at(sums[0], owner, segments * patches)
        np.add.at(sums[1], owner, segments * each)
        return sums[0], sums[1]


def segment_runs(shape: SampleShape) -> list[tuple[int, int]]:
    """(patches of each, attention segments) of every run of segments of like size, in order."""
    return [(patches, len(list(own))) for patches, own in groupby(segment.grid.num_patches for segment in shape.segments)]


def _decoder_costs(tokens: np.ndarray, cost: CostModel) -> np.ndarray:
    return cost.decoder_token * tokens + cost.decoder_pair * (tokens * (tokens + 1) // 2) + cost.decoder_document
