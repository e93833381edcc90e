"""Samples of a step -> replicas and microbatches, as arrays: the part of placement that every rank works out for all replicas.

What is made even depends on where ranks wait for each other:

- `step`: once, when gradients are reduced. The sum of decoder and ViT of each replica.
- `phase`: between the ViT and the decoder as well. Each of the two.
- `microbatch`: after every microbatch (pipelines; parameters gathered per layer). The decoder's rows that run at the same
  time, and the ViT's total.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from megatron_keye.plan.heap_kernels import count_rows, fill
from megatron_keye.plan.spread import NO_LIMIT, SPEED_BASE, common_scale, exact_sum, improve, lower_bound, slowness_of, spread, sum_by_bin

Barrier = Literal["step", "phase", "microbatch"]

_SPARE_PERCENT = 5
"""Room left when microbatches are counted by tokens alone, since rows seldom come out full."""


class StepCosts(NamedTuple):
    """Samples of a step, in slot order, int64 [n] each: padded tokens, patches, and what decoder and ViT cost, in one unit."""

    tokens: np.ndarray
    patches: np.ndarray
    decoder: np.ndarray
    vision: np.ndarray


@dataclass(frozen=True, slots=True)
class AssignmentRules:
    """What an assignment must respect. `speeds` of the replicas are per mille, () for all alike."""

    num_replicas: int
    seq_length_tokens: int
    microbatch_multiple: int = 1
    barrier: Barrier = "step"
    speeds: tuple[int, ...] = ()
    replica_patches: int = NO_LIMIT
    """The memory that a replica has for pixels, except under a barrier per microbatch, which leaves no choice."""

    @property
    def slowness(self) -> np.ndarray:
        return slowness_of(self.speeds or None, self.num_replicas)

    def round_up_rows(self, num_rows: int) -> int:
        return max(1, -(-num_rows // self.microbatch_multiple)) * self.microbatch_multiple


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a step's samples go, by slot: `replica` int64 [n]; `row` int64 [n], or None where each replica packs its own rows;
    and the number of rows of every replica."""

    replica: np.ndarray
    row: np.ndarray | None
    num_rows: int


def assign_samples(costs: StepCosts, rules: AssignmentRules) -> Assignment:
    """The assignment of a step whose samples all fit a row."""
    if rules.barrier == "microbatch":
        return _rows_of_like_cost(costs, rules)
    kinds = [costs.decoder + costs.vision] if rules.barrier == "step" else [costs.decoder, costs.vision]
    replica = spread(kinds, rules.num_replicas, costs.patches, rules.replica_patches, rules.speeds or None)
    needed = rows_needed(costs.tokens, replica, rules.num_replicas, rules.seq_length_tokens)
    return Assignment(replica, None, rules.round_up_rows(int(needed.max())))


def rows_needed(tokens: np.ndarray, replica: np.ndarray, num_replicas: int, seq_length_tokens: int) -> np.ndarray:
    """int64 [num_replicas]: rows that each replica's samples take when packed best fit, largest first."""
    order = np.argsort(replica * (seq_length_tokens + 1) - tokens, kind="stable")
    counts = np.bincount(replica, minlength=num_replicas)
    room = np.zeros(int(counts.max()), np.int64)
    needed = np.zeros(num_replicas, np.int64)
    count_rows(8 * len(order), counts, tokens[order], seq_length_tokens, room, needed)
    return needed


def _fewest_rows(tokens: np.ndarray, rules: AssignmentRules) -> int:
    capacity = rules.num_replicas * rules.seq_length_tokens
    return max(1, -(-exact_sum(tokens) * (100 + _SPARE_PERCENT) // (100 * capacity)))


def _rows_of_like_cost(costs: StepCosts, rules: AssignmentRules) -> Assignment:
    """Microbatch by microbatch: the dearest samples left set a level, which each replica's row is filled up to.

    Long documents so meet in the same microbatches, where the rows beside them are filled with the next longest.
    """
    decoder, vision = common_scale(costs.decoder, costs.vision)
    fewest = rules.round_up_rows(_fewest_rows(costs.tokens, rules))
    order = np.lexsort((-costs.tokens, -decoder))
    row_of, microbatch_of = np.zeros(len(decoder), np.int64), np.zeros(len(decoder), np.int64)
    scratch = [np.zeros(rules.num_replicas, np.int64) for _ in range(5)]
    microbatch = 0
    while len(order):
        level = _level(decoder[order], costs.tokens[order], rules, fewest - microbatch)
        fill(32 * len(order), order, decoder, costs.tokens, rules.seq_length_tokens, level, rules.slowness, *scratch, row_of)
        placed = row_of[order] >= 0
        microbatch_of[order[placed]] = microbatch
        order = order[~placed]
        microbatch += 1
    replica = _deal_rows(row_of, microbatch_of, vision, rules)
    _exchange_within_microbatches(StepCosts(costs.tokens, costs.patches, decoder, vision), microbatch_of, replica, rules)
    return Assignment(replica, microbatch_of, rules.round_up_rows(microbatch))


def _level(decoder: np.ndarray, tokens: np.ndarray, rules: AssignmentRules, rows_left: int) -> int:
    """The finish time up to which rows of a microbatch are filled from these samples, the dearest first: an equal share, at
    least the dearest one's."""
    rows_left = max(rows_left, _fewest_rows(tokens, rules))
    rate = int((SPEED_BASE**2 // rules.slowness).sum())
    equal_share = -(-exact_sum(decoder) * SPEED_BASE**2 // (rate * rows_left))
    return max(equal_share, int(decoder[0]) * int(rules.slowness.min()))


def _deal_rows(row_of: np.ndarray, microbatch_of: np.ndarray, vision: np.ndarray, rules: AssignmentRules) -> np.ndarray:
    """The replica of each sample: rows of a microbatch are alike to the decoder, so those with most vision go to the replicas that
    have least so far. Only replicas of one speed change rows."""
    num_microbatches = int(microbatch_of.max()) + 1
    by_row = np.zeros((num_microbatches, rules.num_replicas), np.int64)
    np.add.at(by_row, (microbatch_of, row_of), vision)
    replica_of_row = np.zeros_like(by_row)
    slowness = rules.slowness
    for speed in np.unique(slowness):
        peers = np.flatnonzero(slowness == speed)
        loads = np.zeros(len(peers), np.int64)
        for microbatch in np.argsort(-by_row.max(axis=1), kind="stable"):
            most_first = np.argsort(-by_row[microbatch, peers], kind="stable")
            least_first = np.argsort(loads, kind="stable")
            replica_of_row[microbatch, peers[most_first]] = peers[least_first]
            loads[least_first] += by_row[microbatch, peers[most_first]]
    return replica_of_row[microbatch_of, row_of]


def _exchange_within_microbatches(costs: StepCosts, microbatch_of: np.ndarray, replica: np.ndarray, rules: AssignmentRules) -> None:
    """Make the ViT's totals more even by moves and swaps between rows of one microbatch, as far as the decoder's rows stay alike."""
    slowness, num_replicas = rules.slowness, rules.num_replicas
    if num_replicas == 1:
        return
    vision_loads = sum_by_bin(replica, costs.vision, num_replicas)
    vision_bound = lower_bound(costs.vision, slowness)
    for microbatch in range(int(microbatch_of.max()) + 1):
        members = np.flatnonzero(microbatch_of == microbatch)
        bins = replica[members]
        items = (costs.decoder[members], costs.vision[members], costs.tokens[members])
        loads = (sum_by_bin(bins, items[0], num_replicas), vision_loads, sum_by_bin(bins, items[2], num_replicas))
        floor = int((loads[0] * slowness).max()) + vision_bound
        improve(items, loads, rules.seq_length_tokens, slowness, bins, floor)
        replica[members] = bins
