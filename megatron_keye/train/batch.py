"""One step's inputs as this rank's devices take them: microbatches of local tokens, and rounds of patches to encode."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_keye.config.schema import RunConfig
from megatron_keye.contract.rows import RowTokens, next_tokens
from megatron_keye.model.decoder_config import PRECISION
from megatron_keye.model.encode import EncodeRound
from megatron_keye.model.packed import PackedRow, pack_row
from megatron_keye.parallel.groups import Groups
from megatron_keye.plan.context_split import local_tokens
from megatron_keye.plan.positions import row_positions
from megatron_keye.plan.route import StepRoute, route_step
from megatron_keye.plan.types import ReplicaPlan, Row, StepPlan


@dataclass(frozen=True)
class RankInputs:
    """What reached this rank for one step: its replica's rows (on the pipeline's first and last stage, else None), the uint8
    patches [num_patches, 588] of each of its encode rounds, and the supervised tokens of the whole world."""

    plan: StepPlan
    rows: Sequence[RowTokens] | None
    patches: Sequence[torch.Tensor]
    num_supervised: int


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


def make_batch(inputs: RankInputs, config: RunConfig, groups: Groups, device: torch.device) -> StepBatch:
    """Slice, position and move `inputs` to `device`. Uses no collectives, so it may run ahead in another thread."""
    replica = inputs.plan.replicas[groups.coordinate("dp")]
    route = route_step(replica, groups.grid, config.parallel.sequence_parallel, groups.replica_rank)
    microbatches = tuple(
        _microbatch(row, None if inputs.rows is None else inputs.rows[number], route.places[number], config, groups, device)
        for number, row in enumerate(replica.rows)
    )
    grids = encoder_grids(replica, groups.replica_rank)
    rounds = tuple(
        EncodeRound(patches.to(device), tuple(own)) for patches, own in zip(inputs.patches, grids, strict=True)
    )
    return StepBatch(microbatches, rounds, route, inputs.num_supervised)


def encoder_grids(replica: ReplicaPlan, encoder: int) -> list[list]:
    """Per round, the grids of the segments that rank `encoder` of the replica encodes, in plan order."""
    grids: list[list] = [[] for _ in range(replica.num_rounds)]
    for task in replica.tasks:
        if task.encoder == encoder:
            document = replica.rows[task.microbatch].documents[task.document]
            grids[task.round].append(document.shape.segments[task.segment].grid)
    return grids


def _microbatch(row: Row, tokens: RowTokens | None, places, config: RunConfig, groups: Groups, device) -> Microbatch:
    dtype = PRECISION[config.train.precision]
    cp_size, cp_rank = groups.grid.cp, groups.coordinate("cp")
    positions = row_positions(row, config.model.variant)
    packed = pack_row(
        row.cu_seqlens, positions, config.model.decoder, cp_size=cp_size, cp_rank=cp_rank, dtype=dtype, device=device
    )
    token_ids = labels = weights = None
    mine = local_tokens(row.cu_seqlens, cp_size, cp_rank)
    if groups.is_first_stage:
        token_ids = torch.from_numpy(tokens.token_ids[mine]).to(device).unsqueeze(0)
    if groups.is_last_stage:
        next_token, is_supervised = next_tokens(tokens, row.cu_seqlens)
        labels = torch.from_numpy(next_token[mine]).to(device)
        weights = torch.from_numpy(is_supervised[mine]).to(device)
    return Microbatch(packed, token_ids, labels, weights, torch.from_numpy(places).to(device))
