"""Checkpoints of a training run: what of a KeyeModel and its optimizer they hold, in the terms of `checkpoint/`."""

from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor, nn

from megatron_keye.checkpoint.identity import identity
from megatron_keye.checkpoint.load import Loaded, load_latest
from megatron_keye.checkpoint.state import LocalParameter, TrainingState
from megatron_keye.model.names import Piece, decoder_pieces, encoder_pieces
from megatron_keye.train.build import KeyeModel


def resume(folder: Path, model: KeyeModel, optimizer: ChainedOptimizer | None, tokenizer: str) -> Loaded | None:
    """Fill model and optimizer from the newest good checkpoint in `folder`; None where there is none.

    All ranks must call it. Raises CheckpointError for a checkpoint of another model, and where all are damaged.
    """
    return load_latest(folder, training_state(model, optimizer), identity(model.config.model, tokenizer))


def training_state(model: KeyeModel, optimizer: ChainedOptimizer | None) -> TrainingState:
    """This rank's part of the run. `optimizer` is None where nothing is trained."""
    encoder_ddp = () if model.encoder_ddp is None else (model.encoder_ddp,)
    return TrainingState(
        parameters=tuple(_local_parameters(model)),
        optimizers=() if optimizer is None else tuple(optimizer.chained_optimizers),
        ddp_modules=(*model.chunks_ddp, *encoder_ddp),
        world=model.groups.world,
    )


def _local_parameters(model: KeyeModel) -> Iterable[LocalParameter]:
    groups, decoder = model.groups, model.config.model.decoder
    tp_rank, dp_cp = groups.coordinate("tp"), groups.decoder.dp_cp
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            pieces = decoder_pieces(chunk, {name: _without_data(parameter)}, decoder, groups.grid.tp, tp_rank)
            yield LocalParameter(parameter, tuple(pieces), dp_cp.rank(), dp_cp.size(), saves_whole=tp_rank == 0)
    for name, parameter in model.encoder.named_parameters():
        pieces: tuple[Piece, ...] = tuple(encoder_pieces({name: _without_data(parameter)}))
        yield LocalParameter(parameter, pieces, groups.world.rank(), groups.world.size(), saves_whole=True)


def _without_data(parameter: nn.Parameter) -> Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
