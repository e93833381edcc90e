"""Steps without a dataset: shapes chosen to cross every boundary, random tokens and pixels, the same on every rank and layout.

Used to verify layouts and to measure steps. Everything follows from the sample's number, so each rank makes what it needs.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_keye.config.schema import RunConfig, Variant
from megatron_keye.contract.media import PATCH_VALUES, PatchGrid, SampleShape, Segment
from megatron_keye.contract.rows import RowTokens, num_supervised
from megatron_keye.data.delivery import local_row
from megatron_keye.parallel.groups import Groups
from megatron_keye.plan.types import ReplicaPlan, Replicas, Row
from megatron_keye.train.batch import StepBatch, fill, lay_out
from megatron_keye.train.placement import Planner

PROOF_STEPS = 2


def proof_shapes(variant: Variant) -> list[list[SampleShape]]:
    """Samples of each proof step: odd lengths, images in the middle and at both ends, two that fill about half of a row each,
    a long video, text alone; and a second step with a single image, which leaves most ranks without one."""
    image = [Segment(PatchGrid(1, 6, 10), 5)]
    large = [Segment(PatchGrid(1, 26, 26), 3)]
    wide = [Segment(PatchGrid(1, 10, 52), 19)]
    first_and_last = [Segment(PatchGrid(1, 4, 4), 0), Segment(PatchGrid(1, 2, 8), 9)]
    rich = [
        SampleShape(41, tuple(image)),
        SampleShape(23),
        SampleShape(177, tuple(large)),
        SampleShape(17, tuple(first_and_last)),
        SampleShape(129, _video(variant, frames=13, gap_tokens=3)),
        SampleShape(7),
        SampleShape(57),
        SampleShape(63, (*image, *image)),
        SampleShape(35),
        SampleShape(19),
        SampleShape(157, tuple(wide)),
        SampleShape(61),
        *(SampleShape(n) for n in (9, 13, 21, 5, 29, 15, 25, 11)),
    ]
    sparse = [SampleShape(n) for n in (11, 47, 33, 101, 9, 65, 7, 13, 5, 21)] + [SampleShape(31, tuple(image))]
    return [rich, sparse]


def _video(variant: Variant, frames: int, gap_tokens: int) -> tuple[Segment, ...]:
    if variant == "keye_vl_preview":
        return (Segment(PatchGrid(frames, 4, 6), gap_tokens),)
    return tuple(Segment(PatchGrid(1, 4, 6), gap_tokens) for _ in range(frames))


def synthetic_plan(shapes: Sequence[SampleShape], config: RunConfig, num_replicas: int) -> Replicas:
    """The trainer's own placement of `shapes` on the layout of `config`."""
    return Planner(config, num_replicas).place(range(len(shapes)), shapes)


def synthetic_batch(step: int, replicas: Sequence[ReplicaPlan], config: RunConfig, groups: Groups, device: torch.device) -> StepBatch:
    """This rank's batch of a step so placed: random token ids, about 60 % of the text supervised, random pixels."""
    replica = replicas[groups.coordinate("dp")]
    vocab_size = config.model.decoder.vocab_size
    rows = [_row_tokens(row, step, vocab_size) for row in replica.rows]
    patches = [
        torch.from_numpy(np.concatenate([np.zeros((0, PATCH_VALUES), dtype=np.uint8), *own]))
        for own in _patches_by_round(replica, groups.replica_rank, step)
    ]
    every_row = [row for share in replicas for row in share.rows]
    supervised = sum(num_supervised(_row_tokens(row, step, vocab_size), row.cu_seqlens) for row in every_row)
    grid, rank = groups.grid, groups.replica_rank
    local = [local_row(tokens, row.cu_seqlens, grid, rank) for tokens, row in zip(rows, replica.rows, strict=True)]
    return fill(lay_out(replica, config, groups, device), local, patches, supervised, device)


def _row_tokens(row: Row, step: int, vocab_size: int) -> RowTokens:
    token_ids = np.zeros(row.num_tokens, dtype=np.int64)
    supervised = np.zeros(row.num_tokens, dtype=bool)
    for document in row.documents:
        random = np.random.default_rng([step, document.sample])
        own = slice(document.start, document.start + document.shape.num_tokens)
        token_ids[own] = random.integers(0, vocab_size, document.shape.num_tokens)
        supervised[own] = random.random(document.shape.num_tokens) < 0.6
        for start, segment in zip(document.shape.visual_starts(), document.shape.segments, strict=True):
            supervised[document.start + start : document.start + start + segment.grid.num_tokens] = False
    return RowTokens(token_ids, supervised)


def _patches_by_round(replica: ReplicaPlan, encoder: int, step: int) -> list[list[np.ndarray]]:
    rounds: list[list[np.ndarray]] = [[] for _ in range(replica.num_rounds)]
    for task in replica.tasks:
        if task.encoder == encoder:
            document = replica.rows[task.microbatch].documents[task.document]
            grid = document.shape.segments[task.segment].grid
            random = np.random.default_rng([step, document.sample, task.segment])
            rounds[task.round].append(random.integers(0, 256, (grid.num_patches, PATCH_VALUES), dtype=np.uint8))
    return rounds
