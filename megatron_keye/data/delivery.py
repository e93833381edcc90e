"""What each rank of a replica gets of a loaded step, and no more: tokens or labels at the ends of the pipeline, of its own slice of every
row; pixels where they are encoded. Both sides know all sizes from the plan, so nothing but the payload travels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_keye.contract.media import PATCH_VALUES
from megatron_keye.contract.rows import LocalRow, RowTokens, row_targets
from megatron_keye.data.loader import ReplicaData, patch_counts
from megatron_keye.parallel.grid import RankGrid
from megatron_keye.plan.context_split import local_tokens
from megatron_keye.plan.types import ReplicaPlan

TOKEN_BYTES = 4


def local_row(tokens: RowTokens, cu_seqlens: Sequence[int], grid: RankGrid, rank: int) -> LocalRow:
    """What replica rank `rank` holds of a row."""
    return _cut(tokens, row_targets(tokens, cu_seqlens), cu_seqlens, grid, rank)


def parcel_bytes(plan: ReplicaPlan, counts: Sequence[Sequence[int]], grid: RankGrid) -> list[int]:
    """Bytes that each rank of the replica gets. `counts` are the plan's `loader.patch_counts`."""
    tokens = sum(row.num_tokens for row in plan.rows) // grid.cp
    return [_kinds(grid, rank) * tokens * TOKEN_BYTES + sum(counts[rank]) * PATCH_VALUES for rank in range(grid.replica_size)]


def parcels(data: ReplicaData, plan: ReplicaPlan, grid: RankGrid) -> list[list[np.ndarray]]:
    """For each rank of the replica, the arrays that its bytes are made of: token ids of all rows, targets of all rows, patches by round."""
    whole = [(tokens, row_targets(tokens, row.cu_seqlens), row.cu_seqlens) for tokens, row in zip(data.rows, plan.rows, strict=True)]
    by_rank = []
    for rank in range(grid.replica_size):
        rows = [_cut(*row, grid, rank) for row in whole]
        fields = [row.token_ids for row in rows] + [row.targets for row in rows]
        patches = [segment for number in range(plan.num_rounds) for segment in data.patches.get((rank, number), [])]
        by_rank.append([field for field in fields if field is not None] + patches)
    return by_rank


def unpack(
    parcel: Tensor, plan: ReplicaPlan, counts: Sequence[Sequence[int]], grid: RankGrid, rank: int
) -> tuple[list[LocalRow], list[Tensor]]:
    """The rows, and the uint8 patches [num_patches, 588] of each encode round, in the bytes uint8 [n] that replica rank `rank` got.
    `counts` as for `parcel_bytes`."""
    lengths = [row.num_tokens // grid.cp for row in plan.rows]
    kinds = _kinds(grid, rank)
    text_bytes = kinds * sum(lengths) * TOKEN_BYTES
    text = parcel[:text_bytes].cpu().numpy().view(np.int32)
    fields = np.split(text, np.cumsum(lengths * kinds)[:-1]) if kinds else []
    nothing = [None] * len(lengths)
    token_ids = fields[: len(lengths)] if grid.coordinate(rank, "pp") == 0 else nothing
    targets = fields[-len(lengths) :] if grid.coordinate(rank, "pp") == grid.pp - 1 else nothing
    rows = [LocalRow(*own) for own in zip(token_ids, targets, strict=True)]
    return rows, list(parcel[text_bytes:].view(-1, PATCH_VALUES).split(list(counts[rank])))


def within_one_rank(data: ReplicaData, plan: ReplicaPlan) -> tuple[list[LocalRow], list[Tensor]]:
    """What `unpack` gives where the replica is one rank, to which nothing has to travel."""
    (arrays,) = parcels(data, plan, RankGrid())
    joined = np.concatenate([np.empty(0, np.uint8), *(array.reshape(-1).view(np.uint8) for array in arrays)])
    return unpack(torch.from_numpy(joined), plan, patch_counts(plan, 1), RankGrid(), 0)


def _cut(tokens: RowTokens, targets: np.ndarray, cu_seqlens: Sequence[int], grid: RankGrid, rank: int) -> LocalRow:
    """`local_row` with the targets of the whole row at hand."""
    stage, own = grid.coordinate(rank, "pp"), local_tokens(cu_seqlens, grid.cp, grid.coordinate(rank, "cp"))
    token_ids = tokens.token_ids[own].astype(np.int32) if stage == 0 else None
    return LocalRow(token_ids, targets[own] if stage == grid.pp - 1 else None)


def _kinds(grid: RankGrid, rank: int) -> int:
    """How many numbers a rank gets for each of its tokens."""
    stage = grid.coordinate(rank, "pp")
    return int(stage == 0) + int(stage == grid.pp - 1)
