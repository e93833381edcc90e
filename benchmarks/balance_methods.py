"""Ways to place the samples of a step on replicas, ours and others', and how long a step takes under each barrier."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.mixes import Samples
from benchmarks.spill import StepSegments, assign_with_spill
from megatron_keye.plan.assignment import AssignmentRules, StepCosts, assign_samples
from megatron_keye.plan.pack import best_fit_decreasing
from megatron_keye.plan.spread import sum_by_bin

PAD_TOKENS = 8


@dataclass(frozen=True)
class Case:
    """One step: its samples, replicas, and tokens that a row holds. `order` of the columns is the order of arrival."""

    samples: Samples
    num_replicas: int
    max_tokens: int

    @property
    def costs(self) -> StepCosts:
        padded = -(-self.samples.tokens // PAD_TOKENS) * PAD_TOKENS
        return StepCosts(padded, np.zeros_like(padded), self.samples.decoder_ns, self.samples.vision_ns)

    @property
    def segments(self) -> StepSegments:
        counts = np.diff(self.samples.first)
        return StepSegments(np.repeat(np.arange(len(counts)), counts), self.samples.segment_ns, self.samples.segment_tokens)

    @property
    def total_ns(self) -> np.ndarray:
        return self.samples.decoder_ns + self.samples.vision_ns


@dataclass(frozen=True)
class Placed:
    """The replica and microbatch of each sample, the replica that encodes each segment, and the share of visual tokens that moves."""

    replica: np.ndarray
    row: np.ndarray | None = None
    encoded_by: np.ndarray | None = None
    moved: float = 0.0


def round_robin(case: Case) -> Placed:
    return Placed(np.arange(len(case.total_ns)) % case.num_replicas)


def unsorted_greedy(case: Case) -> Placed:
    """Samples as they arrive, each to the replica with least so far."""
    replica = np.zeros(len(case.total_ns), np.int64)
    heap = [(0, r) for r in range(case.num_replicas)]
    for slot, cost in enumerate(case.total_ns.tolist()):
        load, replica[slot] = heap[0]
        heapq.heapreplace(heap, (load + cost, int(replica[slot])))
    return Placed(replica)


def karmarkar_karp(case: Case) -> Placed:
    """Largest differencing with equally many samples each (Karmarkar and Karp, 1982; the form that reinforcement learners use).

    Partial solutions, at first one sample for each replica, are joined: the two with the largest spread, large with small sums.
    """
    costs, num_replicas = case.total_ns, case.num_replicas
    chunks = np.argsort(-costs, kind="stable").reshape(-1, num_replicas)
    heap = []
    for number, chunk in enumerate(chunks):
        sums = costs[chunk]
        heap.append((int(sums.min() - sums.max()), number, sums, chunk[:, None]))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, number, sums, members = heapq.heappop(heap)
        _, _, other_sums, other_members = heapq.heappop(heap)
        large_first, small_first = np.argsort(-sums, kind="stable"), np.argsort(other_sums, kind="stable")
        joined = sums[large_first] + other_sums[small_first]
        members = np.concatenate([members[large_first], other_members[small_first]], axis=1)
        heapq.heappush(heap, (int(joined.min() - joined.max()), number, joined, members))
    replica = np.zeros(len(costs), np.int64)
    replica[heap[0][3]] = np.arange(num_replicas)[:, None]
    return Placed(replica)


def per_microbatch_lpt(case: Case) -> Placed:
    """Samples are cut into microbatches as they arrive, by tokens; each is shared out largest first, without regard to the others."""
    tokens, costs, capacity = case.costs.tokens, case.total_ns, case.num_replicas * case.max_tokens
    microbatch = (np.cumsum(tokens) - 1) * 20 // (capacity * 17)  # 85 % full, so that rows seldom overflow
    replica = np.zeros(len(tokens), np.int64)
    for number in range(int(microbatch[-1]) + 1):
        members = np.flatnonzero(microbatch == number)
        heap = [(0, r) for r in range(case.num_replicas)]
        for slot in members[np.argsort(-costs[members], kind="stable")].tolist():
            load, replica[slot] = heap[0]
            heapq.heapreplace(heap, (load + int(costs[slot]), int(replica[slot])))
    return Placed(replica, microbatch)


def packed_on_arrival(case: Case) -> Placed:
    """Rows are filled as samples arrive, until the next does not fit, and dealt to the replicas in turn."""
    pack = np.zeros(len(case.total_ns), np.int64)
    number, room = 0, case.max_tokens
    for slot, tokens in enumerate(case.costs.tokens.tolist()):
        if tokens > room:
            number, room = number + 1, case.max_tokens
        pack[slot] = number
        room -= tokens
    return Placed(pack % case.num_replicas, pack // case.num_replicas)


def ours(barrier: str) -> Callable[[Case], Placed]:
    def place(case: Case) -> Placed:
        assignment = assign_samples(case.costs, AssignmentRules(case.num_replicas, case.max_tokens, 1, barrier))
        return Placed(assignment.replica, assignment.row)

    return place


def ours_with_spill(case: Case) -> Placed:
    segments = case.segments
    assignment, spill = assign_with_spill(case.costs, segments, AssignmentRules(case.num_replicas, case.max_tokens, 1, "phase"))
    return Placed(assignment.replica, None, spill.encoded_by, spill.moved_share(segments.tokens))


METHODS: dict[str, Callable[[Case], Placed]] = {
    "round robin": round_robin,
    "unsorted greedy": unsorted_greedy,
    "Karmarkar-Karp, equal": karmarkar_karp,
    "LPT per microbatch": per_microbatch_lpt,
    "packed on arrival": packed_on_arrival,
    "ours, step": ours("step"),
    "ours, phase": ours("phase"),
    "ours, phase + spill": ours_with_spill,
    "ours, microbatch": ours("microbatch"),
}


def over_bound(case: Case, placed: Placed) -> dict[str, float]:
    """Time of the step under each barrier, over max(mean, largest item); for two phases, over the sum of the two bounds.

    "microbatch, rows" is over a bound that knows of rows as well.
    """
    samples = case.samples
    decoder = sum_by_bin(placed.replica, samples.decoder_ns, case.num_replicas)
    if placed.encoded_by is None:
        vision = sum_by_bin(placed.replica, samples.vision_ns, case.num_replicas)
        vision_bound = _bound(samples.vision_ns, case)
    else:
        vision = sum_by_bin(placed.encoded_by, samples.segment_ns, case.num_replicas)
        vision_bound = _bound(samples.segment_ns, case)
    decoder_bound = _bound(samples.decoder_ns, case)
    in_turn = float(_rows_in_turn(case, placed).max(axis=1).sum())
    return {
        "step": float((decoder + vision).max() / _bound(case.total_ns, case)),
        "phase": float((decoder.max() + vision.max()) / (decoder_bound + vision_bound)),
        "microbatch": in_turn / decoder_bound,
        "microbatch, rows": in_turn / max(decoder_bound, _rows_bound(case)),
    }


def bound_over_mean(case: Case) -> float:
    return float(_bound(case.total_ns, case) * case.num_replicas / case.total_ns.sum())


def _bound(costs: np.ndarray, case: Case) -> float:
    return max(costs.sum() / case.num_replicas, costs.max())


def _rows_bound(case: Case) -> float:
    """What no packing can beat with a barrier per microbatch, since a token costs more the longer its document is.

    Documents of more than half a row have rows of their own, so the k slowest microbatches last as long as the 1st, the
    (replicas + 1)th, ... longest of them at least. They hold at most k rows of tokens per replica, which cost most when taken from the
    longest documents; what is left has to be done after them.
    """
    order = np.argsort(-case.costs.decoder, kind="stable")
    decoder, tokens = case.costs.decoder[order], case.costs.tokens[order]
    row_tokens = case.num_replicas * case.max_tokens
    slowest = decoder[:: case.num_replicas][tokens[:: case.num_replicas] > case.max_tokens // 2]
    filled, costs = np.cumsum(tokens), np.concatenate([np.cumsum(decoder), [decoder.sum()]])
    bound = 0.0
    for k in range(1, len(slowest) + 1):
        within = costs[np.searchsorted(filled, k * row_tokens)]
        bound = max(bound, slowest[:k].sum() + (decoder.sum() - within) / case.num_replicas)
    return bound


def _rows_in_turn(case: Case, placed: Placed) -> np.ndarray:
    """Decoder ns of each row, [microbatches, replicas]. Each replica's rows come by falling cost, which suits everyone.

    Who does not say which rows, or overfills some, gets rows by best fit.
    """
    costs, by_replica = case.costs, []
    for replica in range(case.num_replicas):
        slots = np.flatnonzero(placed.replica == replica)
        rows = None if placed.row is None else placed.row[slots]
        if rows is None or (len(slots) and np.bincount(rows, costs.tokens[slots]).max() > case.max_tokens):
            rows = np.array(best_fit_decreasing(costs.tokens[slots].tolist(), case.max_tokens), np.int64)
        by_replica.append(-np.sort(-np.bincount(rows, costs.decoder[slots])) if len(slots) else np.zeros(1))
    table = np.zeros((max(map(len, by_replica)), case.num_replicas))
    for replica, rows in enumerate(by_replica):
        table[: len(rows), replica] = rows
    return table
