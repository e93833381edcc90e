"""What of a training run lies on this rank, in terms that no layout appears in."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_keye.checkpoint.manifest import WEIGHT
from megatron_keye.checkpoint.optimizer import OptimizerShard, optimizer_shards
from megatron_keye.checkpoint.ranges import Fragment, Rectangle, cut, fragments_of
from megatron_keye.model.names import Piece


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this rank and the canonical pieces in it."""

    parameter: nn.Parameter
    pieces: tuple[Piece, ...]
    """Their views are of a tensor without data, `torch.empty_like(parameter, device="meta")`: only their places count."""
    copy: int
    """Number of this rank among the `num_copies` data-parallel ranks that hold the same part."""
    num_copies: int
    saves_whole: bool
    """Whether this rank saves pieces that every tensor-parallel rank holds whole: true on one of them."""

    @cached_property
    def fragments(self) -> list[Fragment]:
        return [fragment for piece in self.pieces for fragment in fragments_of(piece)]

    @cached_property
    def saved_fragments(self) -> list[Fragment]:
        """Those that this rank's tensor-parallel place has to save."""
        pieces = (p for p in self.pieces if self.saves_whole or p.shape != p.full_shape)
        return [fragment for piece in pieces for fragment in fragments_of(piece)]

    @property
    def flat(self) -> Tensor:
        return self.parameter.detach().view(-1)


@dataclass(frozen=True)
class TrainingState:
    """All that a checkpoint saves and fills on this rank.

    `optimizers` are Megatron's `DistributedOptimizer`s (`ChainedOptimizer.chained_optimizers`); with none, all parameters
    count as frozen. `ddp_modules` are Megatron's DDP wrappers whose parameters are gathered after a load. `world` holds all
    ranks that save or load together; None is a process alone.
    """

    parameters: tuple[LocalParameter, ...]
    optimizers: tuple[Any, ...]
    ddp_modules: tuple[Any, ...]
    world: ProcessGroup | None

    def with_shards(self) -> Iterator[tuple[LocalParameter, OptimizerShard | None, bool]]:
        """Each parameter, this rank's shard of its optimizer state, and whether it is trained."""
        shards = optimizer_shards(self.optimizers)
        for local in self.parameters:
            yield local, shards.get(local.parameter), local.parameter in shards


@dataclass(frozen=True)
class SavedPart:
    """A contiguous rectangle that this rank saves. Its key in the file names the rectangle: see `part_key`."""

    kind: str
    name: str
    full_shape: tuple[int, ...]
    rectangle: Rectangle
    data: Tensor
    """[num_rows, num_columns], a view."""
    step: int


def saved_parts(state: TrainingState) -> Iterator[SavedPart]:
    """Everything this rank saves: of trained parameters its optimizer shard, of others an equal share of their copies."""
    for local, shard, is_trained in state.with_shards():
        if shard is not None:
            start, stop, step = shard.start, shard.stop, shard.step()
            tensors = {WEIGHT: shard.main.detach(), **shard.moments()}
        elif not is_trained:
            numel = local.flat.numel()
            start, stop, step = numel * local.copy // local.num_copies, numel * (local.copy + 1) // local.num_copies, 0
            tensors = {WEIGHT: local.flat[start:stop]}
        else:
            continue
        shapes = {piece.name: piece.full_shape for piece in local.pieces}
        for fragment in local.saved_fragments:
            for part in cut(fragment, start, stop):
                for kind, flat in tensors.items():
                    data = matrix(flat, start, part)
                    yield SavedPart(kind, part.name, shapes[part.name], part.rectangle, data, step)


def matrix(flat: Tensor, start: int, part: Fragment) -> Tensor:
    """The elements of `part` as [num_rows, num_columns], where `flat` holds the local parameter from element `start` on."""
    return flat[part.start - start : part.stop - start].view(part.rectangle.num_rows, part.rectangle.num_columns)


def part_key(kind: str, name: str, rectangle: Rectangle) -> str:
    """`exp_avg/model.norm.weight@0,0`: where the stored matrix starts in the canonical one; its shape is in the file."""
    return f"{kind}/{name}@{rectangle.row},{rectangle.column}"


def parse_part_key(key: str) -> tuple[str, int, int]:
    """(`KIND/NAME`, row, column)."""
    tensor, place = key.rsplit("@", 1)
    row, column = place.split(",")
    return tensor, int(row), int(column)
