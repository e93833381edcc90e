"""Attention segments that a replica would give to others to encode, so that no replica's ViT is later than the rest: not in the trainer.

A barrier between ViT and decoder waits for both to be even, and whole samples cannot always make them so. Segments can: only
the excess moves, and of it the large ones first, which have the most work per visual token that must be sent back.

The trainer's step has no such barrier, and to exchange segments between replicas would make one. `spill_gain.py` weighs the two.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_keye.plan.assignment import Assignment, AssignmentRules, StepCosts, assign_samples
from megatron_keye.plan.compiled import Kernel
from megatron_keye.plan.heap_kernels import push, sift
from megatron_keye.plan.spread import common_scale, lower_bound, sum_by_bin

_PASSES = 4
_CLOSE_ENOUGH = 1024
_CLOSE_PER_MILLE = 5
"""Samples stay placed for both phases where, with the spill, that is this close to the bound; else for the decoder alone."""


class StepSegments(NamedTuple):
    """Attention segments of a step, int64 [m] each: the slot of their sample, their cost, and their visual tokens."""

    slot: np.ndarray
    cost: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True, slots=True)
class Spill:
    """`encoded_by` int64 [m]: the replica that encodes each segment. `owner` int64 [m]: the one that has its sample."""

    owner: np.ndarray
    encoded_by: np.ndarray

    def moved_share(self, amounts: np.ndarray) -> float:
        """The share of `amounts` int64 [m], visual tokens say, that belongs to segments encoded elsewhere."""
        return float(amounts[self.owner != self.encoded_by].sum() / max(1, amounts.sum()))


def spill_excess(segments: StepSegments, replica: np.ndarray, rules: AssignmentRules) -> Spill:
    """Move segments from replicas whose ViT would end after the lower bound of all; `replica` int64 [n] by slot."""
    (costs,) = common_scale(segments.cost)
    owner = replica[segments.slot]
    encoded_by, slowness = owner.copy(), rules.slowness
    level = lower_bound(costs, slowness) // slowness
    # Who receives a large segment may then have to give smaller ones, so the same is done a few times.
    for _ in range(_PASSES):
        loads = sum_by_bin(encoded_by, costs, rules.num_replicas)
        excess = np.maximum(0, loads - level - level // _CLOSE_ENOUGH)
        order = np.flatnonzero(excess[encoded_by] > 0)
        if not len(order):
            break
        order = order[np.argsort(-costs[order], kind="stable")]
        taken = np.zeros(len(costs), np.int64)
        shed(8 * len(order), order, costs, encoded_by, excess, taken)
        moved = order[taken[order] > 0]
        loads -= sum_by_bin(encoded_by[moved], costs[moved], rules.num_replicas)
        scratch = [np.zeros(rules.num_replicas, np.int64) for _ in range(2)]
        receive(32 * (len(moved) + rules.num_replicas), moved, costs, slowness, loads, *scratch, encoded_by)
    return Spill(owner, encoded_by)


def assign_with_spill(costs: StepCosts, segments: StepSegments, rules: AssignmentRules) -> tuple[Assignment, Spill]:
    """The assignment of a step under a barrier between ViT and decoder, and its spill.

    Samples placed for both phases need little spill; where that leaves the decoder uneven, they are placed for it alone.
    """
    assignment = assign_samples(costs, rules)
    spill = spill_excess(segments, assignment.replica, rules)
    bound = lower_bound(costs.decoder, rules.slowness) + lower_bound(segments.cost, rules.slowness)
    if phase_time(costs, segments, assignment, spill, rules) * 1000 <= bound * (1000 + _CLOSE_PER_MILLE):
        return assignment, spill
    decoder_only = assign_samples(costs._replace(vision=np.zeros_like(costs.vision)), rules)
    return decoder_only, spill_excess(segments, decoder_only.replica, rules)


def phase_time(costs: StepCosts, segments: StepSegments, assignment: Assignment, spill: Spill, rules: AssignmentRules) -> int:
    """When the last replica has its decoder done plus when the last has its ViT done, in units of cost times slowness."""
    decoder = sum_by_bin(assignment.replica, costs.decoder, rules.num_replicas) * rules.slowness
    vision = sum_by_bin(spill.encoded_by, segments.cost, rules.num_replicas) * rules.slowness
    return int(decoder.max()) + int(vision.max())


def _shed(order, costs, owners, excess, taken):
    """Mark items to take from bins above their level: by falling cost those that fit the excess, then one that covers the rest."""
    for i in order:
        if 0 < costs[i] <= excess[owners[i]]:
            taken[i] = 1
            excess[owners[i]] -= costs[i]
    for at in range(len(order) - 1, -1, -1):
        i = order[at]
        if taken[i] == 0 and excess[owners[i]] > 0 and costs[i] >= excess[owners[i]]:
            taken[i] = 1
            excess[owners[i]] -= costs[i]


def _receive(order, costs, slowness, loads, finish, heap, bins):
    """Each item of `order` to the bin that has finished first so far. Ties go to the bin that comes first."""
    for bin in range(len(slowness)):
        finish[bin] = loads[bin] * slowness[bin]
        push(heap, finish, bin, bin)
    for i in order:
        bin = heap[0]
        bins[i] = bin
        loads[bin] += costs[i]
        finish[bin] += costs[i] * slowness[bin]
        sift(heap, finish, 0, len(slowness))


shed = Kernel(_shed)
receive = Kernel(_receive, (sift, push))
