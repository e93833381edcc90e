"""From the leader of a replica to its ranks: rows to those that need tokens or labels, pixels to those that encode them.

Lengths follow from the plan, which every rank has, so nothing but the payload travels.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_keye.contract.media import PATCH_VALUES
from megatron_keye.contract.rows import RowTokens


def broadcast_rows(
    rows: Sequence[RowTokens] | None, row_lengths: Sequence[int], group: ProcessGroup, leader: int, device: torch.device
) -> list[RowTokens]:
    """The leader's rows on every rank of `group`; others pass None. One int32 per token: its id, and supervision in bit 0."""
    if rows is None:
        payload = torch.empty(sum(row_lengths), dtype=torch.int32, device=device)
    else:
        packed = np.concatenate([row.token_ids * 2 + row.supervised for row in rows]).astype(np.int32)
        payload = torch.from_numpy(packed).to(device)
    dist.broadcast(payload, src=leader, group=group)
    received = payload.cpu().numpy()
    ends = np.cumsum(row_lengths)[:-1]
    return [RowTokens((part >> 1).astype(np.int64), (part & 1).astype(bool)) for part in np.split(received, ends)]


def scatter_patches(
    patches: np.ndarray | None, counts: Sequence[Sequence[int]], group: ProcessGroup, device: torch.device
) -> list[Tensor]:
    """Each rank of the replica gets the uint8 patches [n, 588] of each of its rounds, straight from the leader, rank 0.

    `counts[rank][round]` come from the plan; the leader passes all patches ordered by (rank, round), others None.
    """
    totals = [sum(rounds) for rounds in counts]
    mine = counts[group.rank()]
    send_sizes = [0] * len(counts) if patches is None else [total * PATCH_VALUES for total in totals]
    receive_sizes = [totals[group.rank()] * PATCH_VALUES] + [0] * (len(counts) - 1)
    flat = np.zeros(0, dtype=np.uint8) if patches is None else patches.reshape(-1)
    received = torch.empty(sum(receive_sizes), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.from_numpy(flat).to(device), receive_sizes, send_sizes, group=group)
    return list(received.view(-1, PATCH_VALUES).split(list(mine)))
