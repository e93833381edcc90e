"""Fill a training state, or the weights of a model alone, from a checkpoint that any layout has saved.

Each rank reads only the rectangles that meet what it holds. Nothing is written before the files' checksums and the model's
identity have been checked on all ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_keye.checkpoint.collective import exchange, together
from megatron_keye.checkpoint.files import TensorFile
from megatron_keye.checkpoint.manifest import WEIGHT, Identity, Manifest, RunRecord, read_manifest, require_same_model
from megatron_keye.checkpoint.optimizer import OptimizerShard
from megatron_keye.checkpoint.ranges import Rectangle, cut, matrix_shape
from megatron_keye.checkpoint.state import LocalParameter, TrainingState, matrix, parse_part_key
from megatron_keye.checkpoint.store import find_damage, latest_good
from megatron_keye.errors import CheckpointError
from megatron_keye.model.names import Piece


@dataclass(frozen=True)
class Loaded:
    """What was loaded. The same on all ranks."""

    path: Path
    run: RunRecord
    fresh_moments: tuple[str, ...]
    """Tensors that are trained here but have no optimizer state in the checkpoint; theirs starts from zero."""
    passed_over: tuple[str, ...]
    """What is wrong with newer checkpoints that were passed over."""


def load_checkpoint(path: Path, state: TrainingState, identity: Identity) -> Loaded:
    """Fill `state` from one checkpoint. All ranks must call it.

    Raises CheckpointError on all ranks when the checkpoint is missing, damaged (each bad file is named) or of another model
    (every difference is listed).
    """
    damage = find_damage(path, state.world)
    if damage:
        raise CheckpointError(
            f"{path} is damaged:\n" + "\n".join(f"  - {d}" for d in damage) + "\nUse an earlier checkpoint, or copy this one again."
        )
    return _load(path, state, identity, ())


def load_latest(folder: Path, state: TrainingState, identity: Identity) -> Loaded | None:
    """Fill `state` from the newest good checkpoint in `folder`; None where there is no checkpoint at all.

    Raises CheckpointError as `load_checkpoint` does, and when there are checkpoints but every one is damaged: starting over
    must be somebody's decision.
    """
    path, passed_over = latest_good(folder, state.world)
    if path is None and passed_over:
        raise CheckpointError(
            f"Every checkpoint in {folder} is damaged:\n" + "\n".join(f"  - {d}" for d in passed_over)
            + "\nRestore one from a copy, or move them away to start over."
        )  # fmt: skip
    return None if path is None else _load(path, state, identity, tuple(passed_over))


@torch.no_grad()
def load_weights(path: Path, pieces: Iterable[Piece], world: ProcessGroup | None = None) -> RunRecord:
    """Fill the weights of a model at any layout, not its optimizer, and return the record of the run that saved them.

    `pieces` have views of this rank's parameters. All ranks of `world` must call it. Uses host memory for one piece. Raises
    CheckpointError as `load_checkpoint` does.
    """
    damage = find_damage(path, world)
    if damage:
        raise CheckpointError("\n".join(damage))
    return together(world, lambda: _fill_weights(path, list(pieces)))


def _fill_weights(path: Path, pieces: list[Piece]) -> RunRecord:
    manifest = read_manifest(path)
    require_same_model(path, manifest, manifest.model, pieces)
    reader = CheckpointReader(path, manifest)
    for piece in pieces:
        num_rows, num_columns = matrix_shape(piece.shape)
        offset = (*piece.offset, 0, 0)[:2] if len(piece.shape) == 2 else (*piece.offset[:1], 0)
        buffer = piece.view.new_empty(num_rows, num_columns)
        reader.read(f"{WEIGHT}/{piece.name}", Rectangle(*offset, num_rows, num_columns), buffer)
        piece.view.copy_(buffer.view(piece.view.shape))
    return manifest.run


class CheckpointReader:
    """Reads any rectangle of any stored tensor. Files are opened when first needed."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._places = cache(self._index)

    def read(self, key: str, wanted: Rectangle, destination: Tensor) -> None:
        """Fill `destination` [num_rows, num_columns] with rectangle `wanted` of tensor `key`, converting its type.

        Raises CheckpointError where the checkpoint does not hold all of it.
        """
        found = 0
        record = self.manifest.tensors.get(key)
        for number in record.files if record else ():
            file, places = self._places(number)
            for name, stored in places.get(key, ()):
                common = stored.common(wanted)
                if common is not None:
                    destination[common.index_within(wanted)].copy_(file.tensor(name)[common.index_within(stored)])
                    found += common.numel
        if found != wanted.numel:
            raise CheckpointError(f"{self.path} holds {found} of {wanted.numel} elements of {wanted} of {key}; use another checkpoint")

    def rows(self, key: str, wanted: Rectangle) -> Tensor | None:
        """Whole rows `wanted` of tensor `key`, where one stored rectangle holds all of them; else None."""
        record = self.manifest.tensors[key]
        for number in record.files:
            file, places = self._places(number)
            for name, stored in places.get(key, ()):
                if stored.common(wanted) == wanted and stored.num_columns == wanted.num_columns:
                    first = wanted.row - stored.row
                    return file.rows(name, first, first + wanted.num_rows)
        return None

    def _index(self, number: int) -> tuple[TensorFile, dict[str, list[tuple[str, Rectangle]]]]:
        """A file, and the names in it with their rectangles, by key."""
        file = TensorFile(self.path / self.manifest.files[number].name)
        places: dict[str, list[tuple[str, Rectangle]]] = {}
        for name in file.names():
            key, row, column = parse_part_key(name)
            places.setdefault(key, []).append((name, Rectangle(row, column, *file.shape(name))))
        return file, places


def _load(path: Path, state: TrainingState, identity: Identity, passed_over: tuple[str, ...]) -> Loaded:
    manifest = together(state.world, lambda: _checked_manifest(path, state, identity))
    fresh = together(state.world, lambda: _fill(CheckpointReader(path, manifest), state))
    for module in state.ddp_modules:
        module.start_param_sync(force_sync=True)
    names = sorted({name for rank in exchange(state.world, fresh) for name in rank})
    return Loaded(path, manifest.run, tuple(names), passed_over)


def _checked_manifest(path: Path, state: TrainingState, identity: Identity) -> Manifest:
    manifest = read_manifest(path)
    require_same_model(path, manifest, identity, (piece for local in state.parameters for piece in local.pieces))
    return manifest


@torch.no_grad()
def _fill(reader: CheckpointReader, state: TrainingState) -> list[str]:
    """Returns the names whose moments start from zero."""
    fresh = []
    for local, shard, is_trained in state.with_shards():
        if not is_trained:
            _read_range(reader, WEIGHT, local, 0, local.flat)
        elif shard is not None:
            fresh += _fill_shard(reader, local, shard)
    return fresh


def _fill_shard(reader: CheckpointReader, local: LocalParameter, shard: OptimizerShard) -> list[str]:
    names = [piece.name for piece in local.pieces]
    steps = {reader.manifest.steps.get(name, 0) for name in names}
    if len(steps) > 1:
        raise CheckpointError(f"{', '.join(names)} are trained as one but have seen {sorted(steps)} updates; use another checkpoint")
    step = steps.pop()
    _read_range(reader, WEIGHT, local, shard.start, shard.main)
    for kind, moment in shard.restart(step).items():
        _read_range(reader, kind, local, shard.start, moment)
    # Gathering the parameters spreads these; in float32 and float64 runs the main weights are this very memory.
    local.flat[shard.start : shard.stop].copy_(shard.main)
    return names if step == 0 else []


def _read_range(reader: CheckpointReader, kind: str, local: LocalParameter, start: int, flat: Tensor) -> None:
    """Fill `flat`, which holds the local parameter from element `start` on. Rows that pad the vocabulary keep what they are."""
    for fragment in local.fragments:
        for part in cut(fragment, start, start + flat.numel()):
            reader.read(f"{kind}/{part.name}", part.rectangle, matrix(flat, start, part))
