"""Routes: which row of which rank's encoder output goes to which place of which rank's embeddings, and back.

A visual row is produced by the rank that encodes its segment and consumed by the ranks of pipeline stage 0 that hold its
position: the CP rank that has the token and, under sequence parallelism, the TP rank that has its slice. Without sequence
parallelism every TP rank of that CP rank gets the row, and TP rank 0 alone returns the gradient, because all of them
compute the same complete one. Exchanges run within the replica, one round of the encoder at a time.

Everything is int64 numpy arithmetic on the replica's plan; `exchange` in `model/encode.py` executes it.
"""

from dataclasses import dataclass

import numpy as np

from megatron_keye.parallel.grid import RankGrid
from megatron_keye.plan.context_split import local_tokens
from megatron_keye.plan.types import ReplicaPlan, Row


@dataclass(frozen=True)
class Exchange:
    """One all-to-all within the replica, as one rank sees it. Rows to or from rank i of the replica are contiguous, in
    rank order; `send_counts[i]` and `receive_counts[i]` say how many."""

    send_rows: np.ndarray
    """Row of the local source tensor that each sent row is."""
    send_counts: tuple[int, ...]
    receive_rows: np.ndarray
    """Row of the local target tensor that each received row becomes."""
    receive_counts: tuple[int, ...]


@dataclass(frozen=True)
class StepRoute:
    """One rank's exchanges of a step. The slab is the tensor of all visual rows this rank embeds in the step, ordered by
    microbatch and place; it is empty on ranks outside pipeline stage 0."""

    forward: tuple[Exchange, ...]
    """Per round: encoder output rows -> slab rows."""
    backward: tuple[Exchange, ...]
    """Per round: slab rows -> encoder output rows."""
    slab_counts: tuple[int, ...]
    """Slab rows of each microbatch."""
    places: tuple[np.ndarray, ...]
    """Per microbatch, the place of each of its slab rows among the tokens this rank holds."""


@dataclass(frozen=True)
class _Deliveries:
    """Every row's way, as parallel arrays: one entry per (encoder output row, receiving rank)."""

    round: np.ndarray
    encoder: np.ndarray
    row: np.ndarray
    receiver: np.ndarray
    microbatch: np.ndarray
    place: np.ndarray
    returns: np.ndarray

    def where(self, mask: np.ndarray) -> "_Deliveries":
        return _Deliveries(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))


def route_step(plan: ReplicaPlan, grid: RankGrid, sequence_parallel: bool, replica_rank: int) -> StepRoute:
    """The exchanges of rank `replica_rank` of a replica for `plan`."""
    deliveries = _all_deliveries(plan, grid, sequence_parallel and grid.tp > 1)
    mine = deliveries.where(deliveries.receiver == replica_rank)
    order = np.lexsort((mine.place, mine.microbatch))
    slab_row = np.empty(len(order), dtype=np.int64)
    slab_row[order] = np.arange(len(order))
    sent = deliveries.where(deliveries.encoder == replica_rank)
    forward, backward = [], []
    for number in range(plan.num_rounds):
        out, into = sent.round == number, mine.round == number
        forward.append(_exchange(sent.where(out), "receiver", sent.row[out], mine.where(into), "encoder", slab_row[into], grid))
        out, into = into & mine.returns, out & sent.returns
        backward.append(_exchange(mine.where(out), "encoder", slab_row[out], sent.where(into), "receiver", sent.row[into], grid))
    counts = np.bincount(mine.microbatch, minlength=len(plan.rows))
    places = np.split(mine.place[order], np.cumsum(counts)[:-1])
    return StepRoute(tuple(forward), tuple(backward), tuple(int(c) for c in counts), tuple(places))


def _exchange(sent: _Deliveries, to: str, send_rows, received: _Deliveries, source: str, receive_rows, grid: RankGrid) -> Exchange:
    """Both sides list a pair's rows in the order of the encoder's output, so the rows meet without any index on the wire."""
    send_order = np.lexsort((sent.row, getattr(sent, to)))
    receive_order = np.lexsort((received.row, getattr(received, source)))
    size = grid.replica_size
    return Exchange(
        send_rows[send_order],
        tuple(int(c) for c in np.bincount(getattr(sent, to), minlength=size)),
        receive_rows[receive_order],
        tuple(int(c) for c in np.bincount(getattr(received, source), minlength=size)),
    )


def _all_deliveries(plan: ReplicaPlan, grid: RankGrid, sequence_parallel: bool) -> _Deliveries:
    owners = [_owners(row, grid, sequence_parallel) for row in plan.rows]
    encoders_of: dict[tuple[int, int, int], int] = {}
    for task in plan.tasks:
        key = (task.microbatch, task.document, task.segment)
        encoders_of[key] = encoders_of.get(key, 0) + 1
    columns: list[tuple] = []
    next_row: dict[tuple[int, int], int] = {}
    for task in plan.tasks:
        document = plan.rows[task.microbatch].documents[task.document]
        segment = document.shape.segments[task.segment]
        count = segment.grid.num_tokens
        first = next_row.get((task.encoder, task.round), 0)
        next_row[(task.encoder, task.round)] = first + count
        at = document.start + document.shape.visual_starts()[task.segment] + np.arange(count)
        cp_rank, tp_rank, place = (table[at] for table in owners[task.microbatch])
        replicated = encoders_of[(task.microbatch, task.document, task.segment)] > 1
        for copy in range(1 if sequence_parallel else grid.tp):
            receiver = cp_rank * grid.tp + (tp_rank if sequence_parallel else copy)
            # A segment that several ranks encode (the replicated baseline) is delivered only to oneself.
            kept = receiver == task.encoder if replicated else np.ones(count, dtype=bool)
            rows = first + np.arange(count)
            returns = np.full(count, sequence_parallel or copy == 0)
            fixed = (np.full(count, task.round), np.full(count, task.encoder), rows, receiver, np.full(count, task.microbatch))
            columns.append(tuple(column[kept] for column in (*fixed, place, returns)))
    if not columns:
        return _Deliveries(*(np.zeros(0, dtype=np.int64) for _ in range(6)), np.zeros(0, dtype=bool))
    return _Deliveries(*(np.concatenate(parts) for parts in zip(*columns, strict=True)))


def _owners(row: Row, grid: RankGrid, sequence_parallel: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every token of a row: its CP rank, its TP rank (0 without sequence parallelism), and its place there."""
    cp_rank, tp_rank, place = (np.zeros(row.num_tokens, dtype=np.int64) for _ in range(3))
    for rank in range(grid.cp):
        tokens = local_tokens(row.cu_seqlens, grid.cp, rank)
        local = np.arange(len(tokens))
        slice_tokens = len(tokens) // grid.tp if sequence_parallel else max(len(tokens), 1)
        cp_rank[tokens] = rank
        tp_rank[tokens], place[tokens] = np.divmod(local, slice_tokens)
    return cp_rank, tp_rank, place
