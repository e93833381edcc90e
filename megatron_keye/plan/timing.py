"""How long the work of a step takes: few coefficients, fitted to measured times, that predict in integers alike on every host.

    time = tokens * a + pairs * b + items * c + sequences * d

once for each part of a step: the ViT forward and backward (with the projector, whose tokens are a quarter of the patches), and the
decoder, whose passes a pipeline interleaves, as a whole. Coefficients are those of one machine and one layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from megatron_keye.errors import PlanError
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.types import ReplicaPlan, Row

PS_PER_S = 10**12
PARTS = ("vision_forward", "vision_backward", "decoder", "decoder_forward")

_FIT_STEPS = 50
_HALVINGS = 20


class Work(NamedTuple):
    """What one rank computes: in the ViT patches, query-key pairs, attention segments and encode rounds; in the decoder tokens with
    padding, causal pairs, documents and rows, of which the rank does the share that the layout gives it."""

    tokens: int
    pairs: int
    items: int
    sequences: int


def row_work(row: Row) -> Work:
    """The decoder's work on one row. An empty row is one document of padding."""
    ends = row.cu_seqlens
    lengths = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    return Work(row.num_tokens, sum(n * (n + 1) // 2 for n in lengths), len(lengths), 1)


def vision_work(replica: ReplicaPlan, encoder: int) -> Work:
    """The ViT's work on one rank of a replica; all zero where it encodes nothing."""
    tasks = [task for task in replica.tasks if task.encoder == encoder]
    documents = [replica.rows[task.microbatch].documents[task.document] for task in tasks]
    patches = [doc.shape.segments[task.segment].grid.num_patches for doc, task in zip(documents, tasks, strict=True)]
    return Work(sum(patches), sum(n * n for n in patches), len(patches), len({task.round for task in tasks}))


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Picoseconds per unit of work of one part of a step."""

    token_ps: int
    pair_ps: int
    item_ps: int
    sequence_ps: int

    def time_ps(self, work: Work) -> int:
        return self.token_ps * work.tokens + self.pair_ps * work.pairs + self.item_ps * work.items + self.sequence_ps * work.sequences

    def plus(self, other: "Coefficients") -> "Coefficients":
        """Those of two parts that follow each other on the same work."""
        return Coefficients(
            self.token_ps + other.token_ps, self.pair_ps + other.pair_ps, self.item_ps + other.item_ps, self.sequence_ps + other.sequence_ps
        )


NO_TIME = Coefficients(0, 0, 0, 0)
"""Of a part that a layout does not have, such as the backward pass of a frozen ViT."""


@dataclass(frozen=True, slots=True)
class TimeModel:
    """Coefficients of all parts. The decoder's are for one row on one rank, all of its model chunks together: `decoder` forward and
    backward, `decoder_forward` without gradients."""

    vision_forward: Coefficients
    vision_backward: Coefficients
    decoder: Coefficients
    decoder_forward: Coefficients

    @property
    def vision(self) -> Coefficients:
        return self.vision_forward.plus(self.vision_backward)

    def cost_model(self, num_encoders: int) -> CostModel:
        """What placement goes by: picoseconds of a replica's ranks, `num_encoders` of which share its images and all of which wait
        for its rows. Times per row or round are the same wherever a sample goes."""
        vision, decoder = self.vision, self.decoder
        return CostModel(
            decoder_token=decoder.token_ps * num_encoders,
            decoder_pair=decoder.pair_ps * num_encoders,
            vision_patch=vision.token_ps,
            vision_pair=vision.pair_ps,
            projector_token=0,
            decoder_document=decoder.item_ps * num_encoders,
            vision_segment=vision.item_ps,
        )

    def encode_ps(self, replica: ReplicaPlan, encoder: int) -> int:
        """The time of a rank's ViT in a step."""
        return self.vision.time_ps(vision_work(replica, encoder))

    def decode_ps(self, replica: ReplicaPlan, stages: int, chunks: int) -> int:
        """The time of a replica's decoder in a step on `stages` pipeline ranks with `chunks` model chunks each."""
        rows = [self.decoder.time_ps(row_work(row)) for row in replica.rows]
        return sum(rows) + max(rows) * (stages - 1) // chunks


def pipeline_rows(num_rows: int, stages: int, chunks: int) -> float:
    """The time of a pipeline in rows: its ranks also wait while it fills and drains."""
    return num_rows + (stages - 1) / chunks


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients and the relative error |predicted / measured - 1| of each measurement, float64 [n]."""

    coefficients: Coefficients
    errors: np.ndarray


def fit(works: Sequence[Work], seconds: Sequence[float]) -> Fit:
    """The non-negative coefficients with the least squared error of log(predicted / measured), so that short times count as long ones.

    Raises PlanError where there is nothing to fit, no work in a measurement, or a time that is not positive.
    """
    features, times_ps = np.array(works, np.float64).reshape(-1, 4), np.array(seconds, np.float64) * PS_PER_S
    if not len(features) or (features <= 0).any() or not (times_ps > 0).all():
        raise PlanError(
            f"{len(works)} measurements cannot be fitted: expected at least one, each with work and a positive time. "
            "Measure again on a quiet machine."
        )
    scale = features.max(axis=0)
    shares = features / scale
    found = _non_negative_least_squares(shares / times_ps[:, None], np.ones(len(times_ps)))
    for _ in range(_FIT_STEPS):
        better = _improved(shares, times_ps, found)
        if better is None:
            break
        found = better
    coefficients = Coefficients(*(round(value) for value in (found / scale).tolist()))
    predicted_ps = np.array([coefficients.time_ps(work) for work in works], np.float64)
    return Fit(coefficients, np.abs(predicted_ps / times_ps - 1.0))


def _improved(shares: np.ndarray, times_ps: np.ndarray, found: np.ndarray) -> np.ndarray | None:
    """One step of Gauss and Newton with halving; None where it makes the error no smaller by a part in 10^9.

    log(predicted) is linearised around `found`; the step ends within the non-negative coefficients, and so does any part of it.
    """
    predicted_ps = shares @ found
    target = 1.0 - np.log(predicted_ps / times_ps)
    direction = _non_negative_least_squares(shares / predicted_ps[:, None], target) - found
    limit = _log_error(shares @ found, times_ps) * (1.0 - 1e-9)
    for halving in range(_HALVINGS):
        moved = found + direction * 0.5**halving
        if _log_error(shares @ moved, times_ps) < limit:
            return moved
    return None


def _log_error(predicted_ps: np.ndarray, times_ps: np.ndarray) -> float:
    return float(np.square(np.log(predicted_ps / times_ps)).sum()) if (predicted_ps > 0).all() else np.inf


def _non_negative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x >= 0 [k] with the least |matrix x - target|. The best x is an ordinary solution on the columns where it is not zero, and
    four columns have few subsets: all are tried."""
    num_columns = matrix.shape[1]
    best, least = np.zeros(num_columns), np.inf
    for size in range(1, num_columns + 1):
        for columns in map(list, combinations(range(num_columns), size)):
            solution = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
            error = float(np.square(matrix[:, columns] @ solution - target).sum())
            if (solution >= 0).all() and error < least:
                best, least = np.zeros(num_columns), error
                best[columns] = solution
    return best
