"""Equal work within a replica: its attention segments over encoder ranks and rounds."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.pack import best_fit_decreasing
from megatron_keye.plan.spread import spread
from megatron_keye.plan.types import EncodeTask, Row


def imbalance(loads: Sequence[float]) -> float:
    """max / mean: 1.0 is perfect, and 1 - 1/imbalance is the share of time that ranks wait. 1.0 where there is no load."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def place_segments(
    rows: Sequence[Row], encoders: Sequence[int], patches_per_round: int, cost: CostModel, speeds: Sequence[int] | None = None
) -> tuple[EncodeTask, ...]:
    """Every attention segment of a replica's rows, once, with its encoder and round, in the order of `ReplicaPlan.tasks`.

    `speeds` of the encoders are per mille; None for all alike.
    """
    segments = [
        (microbatch, document, segment, entry.grid)
        for microbatch, row in enumerate(rows)
        for document, doc in enumerate(row.documents)
        for segment, entry in enumerate(doc.shape.segments)
    ]
    costs = [cost.vision_cost(grid) for *_, grid in segments]
    shares: dict[int, list[int]] = defaultdict(list)
    for i, encoder in enumerate(spread([np.array(costs, np.int64)], len(encoders), speeds=speeds)):
        shares[encoders[encoder]].append(i)
    tasks = []
    for encoder in sorted(shares):
        mine = shares[encoder]
        rounds = cut_rounds([segments[i][3].num_patches for i in mine], [costs[i] for i in mine], patches_per_round)
        for round_number, i in sorted(zip(rounds, mine, strict=True)):
            microbatch, document, segment, _ = segments[i]
            tasks.append(EncodeTask(microbatch, document, segment, encoder, round_number))
    return tuple(tasks)


def cut_rounds(patches: Sequence[int], costs: Sequence[int], patches_per_round: int) -> list[int]:
    """The round of each segment of one encoder: few rounds, each of at most `patches_per_round` or of one segment.

    Dearer rounds come first, so that rounds that ranks run at the same time are alike.
    """
    bins = best_fit_decreasing(patches, patches_per_round)
    totals: dict[int, int] = defaultdict(int)
    for b, c in zip(bins, costs, strict=True):
        totals[b] += c
    numbers = {b: number for number, b in enumerate(sorted(totals, key=lambda b: (-totals[b], b)))}
    return [numbers[b] for b in bins]
