"""Proof that a layout changes nothing: the same weights and steps under each layout and on one process, compared.

Every rank runs `train/step.py` unchanged on synthetic steps. The one-process run is the reference; a layout's difference is,
per module, max|a - b| / max|b|.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.config.derive import require_valid
from megatron_keye.config.schema import RunConfig
from megatron_keye.model.init import proof_tensor
from megatron_keye.model.names import Piece
from megatron_keye.parallel.cpu import adapt_to_cpu
from megatron_keye.parallel.groups import Groups, build_groups, prepare_megatron
from megatron_keye.parallel.launch import run_ranks
from megatron_keye.plan.types import ReplicaPlan
from megatron_keye.train.build import KeyeModel, build_model, build_optimizer
from megatron_keye.train.layouts import Layout, parse_layout
from megatron_keye.train.placement import rank_grid
from megatron_keye.train.step import TrainStep
from megatron_keye.train.synthetic import proof_shapes, synthetic_batch, synthetic_plan

FLOAT64_TOLERANCE = 1e-10
PROOF_STD = 0.08
"""Spread of the proof's random weights: large enough that every module matters to the loss."""


@dataclass(frozen=True)
class Trace:
    """What one layout did: per step the loss and gradient norm, all gradients of each step before clipping, final weights."""

    losses: list[float]
    grad_norms: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """Largest relative differences of one layout to the reference over all steps; of gradients and weights by module."""

    loss: float
    grad_norm: float
    gradients: dict[str, float]
    weights: dict[str, float]


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that count as rounding. Loss and gradient norm share one, since a single number may be right by chance;
    those of gradients and weights are for the worst module."""

    numbers: float
    gradients: float
    weights: float

    def holds(self, difference: Difference) -> bool:
        within = max(difference.loss, difference.grad_norm) <= self.numbers
        return within and worst(difference.gradients) <= self.gradients and worst(difference.weights) <= self.weights


EXACT = Tolerance(FLOAT64_TOLERANCE, FLOAT64_TOLERANCE, FLOAT64_TOLERANCE)
WIDER = {"bf16": "fp32", "fp32": "fp64"}
"""The precision beside which a precision's own rounding shows."""


def proof_config(config: RunConfig, precision: str) -> RunConfig:
    """The recipe's model, with the short rows and the spread-out weights of the proof."""
    data = config.data.model_copy(update={"seq_length_tokens": 320, "pad_multiple_tokens": 16})
    encode = config.encode.model_copy(update={"patches_per_round": 700})
    train = config.train.model_copy(update={"precision": precision})
    model = config.model.model_copy(update={"init_std": PROOF_STD})
    return config.model_copy(update={"data": data, "encode": encode, "train": train, "model": model})


def trace_layout(config: RunConfig, layout: Layout, reverse_rows: bool = False, timeout_s: float = 300.0) -> Trace:
    """Run the proof's steps under `layout` on freshly started ranks."""
    config = layout.apply(config)
    require_valid(config, layout.world_size)
    prepare = partial(prepare_rank, config.train.precision == "fp64")
    return run_ranks(layout.world_size, trace_rank, config, reverse_rows, prepare=prepare, timeout_s=timeout_s)[0]


def compare(trace: Trace, reference: Trace) -> Difference:
    gradients: dict[str, float] = {}
    for a, b in zip(trace.gradients, reference.gradients, strict=True):
        for module, difference in module_differences(a, b).items():
            gradients[module] = max(gradients.get(module, 0.0), difference)
    return Difference(
        loss=max(map(_relative_difference, trace.losses, reference.losses)),
        grad_norm=max(map(_relative_difference, trace.grad_norms, reference.grad_norms)),
        gradients=gradients,
        weights=module_differences(trace.weights, reference.weights),
    )


def _relative_difference(a: float, b: float) -> float:
    return abs(a - b) / abs(b) if math.isfinite(a) else math.inf


def module_differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """max|a - b| / max|b| per module (the ViT's or decoder's layer, an embedding, a norm, ...); inf where names differ."""
    if a.keys() != b.keys():
        return {name: float("inf") for name in a.keys() ^ b.keys()}
    distance: dict[str, float] = {}
    scale: dict[str, float] = {}
    for name in a:
        module = module_of(name)
        difference = (a[name].double() - b[name].double()).abs().max()
        distance[module] = max(distance.get(module, 0.0), float(difference.nan_to_num(nan=torch.inf)))
        scale[module] = max(scale.get(module, 0.0), float(b[name].abs().max()))
    return {module: distance[module] / scale[module] if scale[module] else distance[module] for module in distance}


def module_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `model.layers.3`; names outside layers lose their last part."""
    layer = re.match(r"(.*layers\.\d+)\.", name)
    return layer[1] if layer else name.rsplit(".", 1)[0]


def worst(differences: dict[str, float]) -> float:
    return max(differences.values())


def tolerance(config: RunConfig, reference: Trace) -> Tolerance:
    """1e-10 in float64; otherwise twice what rounding does to one process: adding up its microbatches in another order, or running
    in the next wider precision, whichever is more.

    Another order alone is no measure of bf16: gradients add up in float32, so it moves them by 1e-8, where any other
    split of a matrix product, which every layout is, rounds activations differently and moves them by 1e-2.
    """
    if config.train.precision == "fp64":
        return EXACT
    reordered = compare(trace_layout(config, parse_layout("one"), reverse_rows=True), reference)
    wider = proof_config(config, WIDER[config.train.precision])
    rounded = compare(reference, trace_layout(wider, parse_layout("one")))
    return Tolerance(
        numbers=2.0 * max(reordered.loss, reordered.grad_norm, rounded.loss, rounded.grad_norm),
        gradients=2.0 * max(worst(reordered.gradients), worst(rounded.gradients)),
        weights=2.0 * max(worst(reordered.weights), worst(rounded.weights)),
    )


def prepare_rank(float64: bool) -> None:
    """What a started rank needs before its world exists."""
    if not torch.cuda.is_available():
        adapt_to_cpu(float64)


def trace_rank(config: RunConfig, reverse_rows: bool) -> Trace:
    """One rank's run; the trace is complete on rank 0."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    world_size = dist.get_world_size()
    num_replicas = world_size // (config.parallel.tp * config.parallel.cp * config.parallel.pp)
    groups = build_groups(rank_grid(config, num_replicas))
    prepare_megatron(groups, config.train.seed)
    model = build_model(config, groups, device, draw=proof_tensor)
    step = TrainStep(model, build_optimizer(model))
    losses, norms, gradients = [], [], []
    for number, shapes in enumerate(proof_shapes(config.model.variant)):
        replicas = synthetic_plan(shapes, config, num_replicas)
        if reverse_rows:
            replicas = replicas.mapped(with_reversed_rows)
        batch = synthetic_batch(number, replicas, config, groups, device)
        losses.append(step.accumulate(batch))
        gradients.append(gather_gradients(model))
        norms.append(step.update(1.0, batch.num_supervised)[0])
    complete_weights(model)
    return Trace(losses, norms, gradients, gather_pieces(model.pieces(), groups))


def with_reversed_rows(replica: ReplicaPlan) -> ReplicaPlan:
    """The same work with the replica's microbatches in the opposite order."""
    last = len(replica.rows) - 1
    tasks = [replace(task, microbatch=last - task.microbatch) for task in replica.tasks]
    tasks.sort(key=lambda task: (task.encoder, task.round, task.microbatch, task.document, task.segment))
    return replace(replica, rows=replica.rows[::-1], tasks=tuple(tasks))


def complete_weights(model: KeyeModel) -> None:
    """After an update with `overlap_param_gather` a rank has new values in its own shard alone, until the next forward pass."""
    for module in model.chunks_ddp:
        if module.ddp_config.overlap_param_gather:
            module.start_param_sync(force_sync=True)


def gather_gradients(model: KeyeModel) -> dict[str, Tensor]:
    """All gradients by canonical name, on rank 0. The distributed optimizer leaves each rank only its shard reduced; the
    shards are gathered first, which completes what an all-reduce would have done."""
    trainable = [*model.chunks_ddp] + ([model.encoder_ddp] if model.encoder_ddp is not None else [])
    for module in trainable:
        for buffer in module.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)

    def main_gradients(module: torch.nn.Module) -> dict[str, Tensor]:
        return {name: p.main_grad for name, p in module.named_parameters() if p.requires_grad}

    return gather_pieces(model.pieces(main_gradients), model.groups)


def gather_pieces(pieces: Iterable[Piece], groups: Groups) -> dict[str, Tensor]:
    """Whole canonical tensors on rank 0, put together from the pieces of the first replica; empty elsewhere."""
    own = []
    if groups.coordinate("dp") == 0 and groups.coordinate("cp") == 0:
        own = [(p.name, p.full_shape, p.index(), p.read().detach().cpu().clone()) for p in pieces]
    gathered: list | None = [None] * groups.grid.world_size if groups.rank == 0 else None
    dist.gather_object(own, gathered, dst=0)
    whole: dict[str, Tensor] = {}
    for name, full_shape, index, tensor in (piece for part in gathered or [] for piece in part):
        if name not in whole:
            whole[name] = torch.full(full_shape, torch.nan, dtype=tensor.dtype)
        whole[name][index] = tensor
    return whole
