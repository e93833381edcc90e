"""Equal work: samples over replicas, attention segments over encoder ranks and rounds. Greedy, largest first."""

import heapq
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.pack import best_fit_decreasing
from megatron_keye.plan.types import EncodeTask, Row

_SHARE_BITS = 28


def imbalance(loads: Sequence[float]) -> float:
    """max / mean: 1.0 is perfect, and 1 - 1/imbalance is the share of time that ranks wait. 1.0 where there is no load."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def place(costs: Sequence[int], num_bins: int) -> list[int]:
    """The bin of each item: dearest first, each to the least loaded bin (longest processing time, LPT).

    The largest load is at most 4/3 of the smallest possible (R. L. Graham, 1969). Ties go to the lower index.
    """
    bins = [0] * len(costs)
    loads = [(0, b) for b in range(num_bins)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, bins[i] = loads[0]
        heapq.heapreplace(loads, (load + costs[i], bins[i]))
    return bins


def place_vectors(costs: Sequence[tuple[int, ...]], num_bins: int) -> list[int]:
    """`place` where an item has several kinds of cost that should each be spread evenly.

    Every kind is measured as a share of its total. Items go by their largest share, each to the bin whose largest load
    stays smallest, then whose sum of loads does. All integers: the same answer on every host.
    """
    totals = [sum(kind) for kind in zip(*costs, strict=True)]
    shares = np.array([[(c << _SHARE_BITS) // max(t, 1) for c, t in zip(cost, totals, strict=True)] for cost in costs], np.int64)
    loads = np.zeros((num_bins, len(totals)), np.int64)
    bins = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-shares[i].max(), i)):
        after = loads + shares[i]
        # No load exceeds 1 << _SHARE_BITS, so with fewer than 8 kinds both numbers fit one comparable int64.
        bins[i] = int(((after.max(axis=1) << (_SHARE_BITS + 3)) + after.sum(axis=1)).argmin())
        loads[bins[i]] += shares[i]
    return bins


def place_segments(rows: Sequence[Row], encoders: Sequence[int], patches_per_round: int, cost: CostModel) -> tuple[EncodeTask, ...]:
    """Every attention segment of a replica's rows, once, with its encoder and round, in the order of `ReplicaPlan.tasks`."""
    segments = [
        (microbatch, document, segment, entry.grid)
        for microbatch, row in enumerate(rows)
        for document, doc in enumerate(row.documents)
        for segment, entry in enumerate(doc.shape.segments)
    ]
    costs = [cost.vision_cost(grid) for *_, grid in segments]
    shares: dict[int, list[int]] = defaultdict(list)
    for i, encoder in enumerate(place(costs, len(encoders))):
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
