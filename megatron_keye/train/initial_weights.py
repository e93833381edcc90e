"""Weights that a new run starts from: of a Hugging Face folder, of a checkpoint, or of another run."""

from collections.abc import Callable
from pathlib import Path

from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_keye.checkpoint.collective import on_first_rank
from megatron_keye.checkpoint.convert import find_checkpoint
from megatron_keye.checkpoint.hf_config import read_hf_config
from megatron_keye.checkpoint.hf_weights import load_hf_weights
from megatron_keye.checkpoint.identity import identity, stored_model
from megatron_keye.checkpoint.load import load_weights
from megatron_keye.checkpoint.manifest import identity_problems, read_manifest
from megatron_keye.config.schema import ModelConfig
from megatron_keye.model.init import initial_tensor, no_tensor
from megatron_keye.model.tensors import canonical_shapes
from megatron_keye.train.build import KeyeModel


def drawing(settings: ModelConfig) -> Callable[..., Tensor]:
    """How the model of a run is filled before anything is loaded: drawing 8 billion numbers for nothing takes minutes."""
    return initial_tensor if settings.init_from is None else no_tensor


def start_from(path: Path, model: KeyeModel, optimizer: ChainedOptimizer | None) -> list[str]:
    """Fill a model of any layout, and the main weights of its optimizer; returns notes on settings that the weights were not made with.

    A run directory stands for its newest checkpoint, whose optimizer state is not used. All ranks must call it. Raises CheckpointError
    on all of them where the weights are damaged, or not those of this model.
    """
    world, settings = model.groups.world, model.config.model
    checkpoint = on_first_rank(world, lambda: find_checkpoint(path))
    if checkpoint is None:
        load_hf_weights(path, model.pieces(), canonical_shapes(settings), world)
    else:
        load_weights(checkpoint, model.pieces(), world)
    if optimizer is not None:
        optimizer.reload_model_params()
    made_with = on_first_rank(world, lambda: _model_of(path, checkpoint))
    return [f"the weights come from {path}", *identity_problems(identity(made_with, ""), identity(settings, ""))]


def _model_of(path: Path, checkpoint: Path | None) -> ModelConfig:
    return read_hf_config(path) if checkpoint is None else stored_model(checkpoint, read_manifest(checkpoint))
