"""One step's inputs as this rank's device takes them: microbatches of local tokens, and rounds of patches to encode.

`lay_out` makes all that follows from the plan, and may run ahead; `fill` adds what was loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_keye.config.schema import RunConfig
from megatron_keye.contract.media import PatchGrid
from megatron_keye.contract.rows import LocalRow
from megatron_keye.model.decoder_config import PRECISION
from megatron_keye.model.encode import EncodeRound
from megatron_keye.model.packed import PackedRow, pack_row
from megatron_keye.parallel.groups import Groups
from megatron_keye.plan.positions import row_positions
from megatron_keye.plan.route import StepRoute, route_step
from megatron_keye.plan.types import ReplicaPlan, Row


@dataclass(frozen=True)
class Microbatch:
    """One packed row on one rank, T local tokens. `token_ids` is None outside the first stage; `labels` and `weights` (1 for
    supervised tokens) are None outside the last."""

    row: PackedRow
    token_ids: Tensor | None
    labels: Tensor | None
    weights: Tensor | None
    visual_places: Tensor


@dataclass(frozen=True)
class StepBatch:
    """Everything the training step consumes."""

    microbatches: tuple[Microbatch, ...]
    rounds: tuple[EncodeRound, ...]
    route: StepRoute
    num_supervised: int


@dataclass(frozen=True)
class RowLayout:
    """One packed row without its tokens."""

    packed: PackedRow
    visual_places: Tensor


@dataclass(frozen=True)
class BatchLayout:
    """All of a batch that follows from the plan alone, so that it can be made while earlier steps run."""

    rows: tuple[RowLayout, ...]
    grids: tuple[tuple[PatchGrid, ...], ...]
    """Of the attention segments of each of this rank's encode rounds."""
    route: StepRoute


def lay_out(replica: ReplicaPlan, config: RunConfig, groups: Groups, device: torch.device) -> BatchLayout:
    """This rank's part of its replica's plan. Uses no collectives, so it may run ahead in another thread."""
    route = route_step(replica, groups.grid, config.parallel.sequence_parallel, groups.replica_rank)
    rows = tuple(_row_layout(row, places, config, groups, device) for row, places in zip(replica.rows, route.places, strict=True))
    grids = tuple(tuple(own) for own in encoder_grids(replica, groups.replica_rank))
    return BatchLayout(rows, grids, route)


def fill(
    layout: BatchLayout, rows: Sequence[LocalRow], patches: Sequence[Tensor], num_supervised: int, device: torch.device
) -> StepBatch:
    """The batch with what was loaded: this rank's part of every row, the uint8 patches [num_patches, 588] of each of its encode rounds,
    and the supervised tokens of the whole world."""
    microbatches = tuple(_microbatch(row, own, device) for row, own in zip(layout.rows, rows, strict=True))
    rounds = tuple(EncodeRound(own.to(device), grids) for own, grids in zip(patches, layout.grids, strict=True))
    return StepBatch(microbatches, rounds, layout.route, num_supervised)


def encoder_grids(replica: ReplicaPlan, encoder: int) -> list[list]:
    """Per round, the grids of the segments that rank `encoder` of the replica encodes, in plan order."""
    grids: list[list] = [[] for _ in range(replica.num_rounds)]
    for task in replica.tasks:
        if task.encoder == encoder:
            document = replica.rows[task.microbatch].documents[task.document]
            grids[task.round].append(document.shape.segments[task.segment].grid)
    return grids


def _row_layout(row: Row, places: np.ndarray, config: RunConfig, groups: Groups, device: torch.device) -> RowLayout:
    cp_size, cp_rank = groups.grid.cp, groups.coordinate("cp")
    positions = row_positions(row, config.model.variant)
    dtype = PRECISION[config.train.precision]
    packed = pack_row(row.cu_seqlens, positions, config.model.decoder, cp_size=cp_size, cp_rank=cp_rank, dtype=dtype, device=device)
    return RowLayout(packed, torch.from_numpy(places).to(device))


def _microbatch(row: RowLayout, tokens: LocalRow, device: torch.device) -> Microbatch:
    token_ids = labels = weights = None
    if tokens.token_ids is not None:
        token_ids = torch.from_numpy(tokens.token_ids).to(device, torch.int64).unsqueeze(0)
    if tokens.targets is not None:
        targets = torch.from_numpy(tokens.targets).to(device, torch.int64)
        labels, weights = targets >> 1, (targets & 1).bool()
    return Microbatch(row.packed, token_ids, labels, weights, row.visual_places)
