"""Weights that a new run starts from: of Hugging Face folders, of checkpoints, of other runs, or fresh, for each module its own."""

from collections.abc import Callable
from pathlib import Path

from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_keye.checkpoint.collective import on_first_rank
from megatron_keye.checkpoint.convert import find_checkpoint
from megatron_keye.checkpoint.hf_weights import load_hf_weights
from megatron_keye.checkpoint.load import load_weights
from megatron_keye.config.schema import ModelConfig, Module
from megatron_keye.model.init import initial_tensor, no_tensor
from megatron_keye.model.modules import MODULES, module_of
from megatron_keye.train.build import KeyeModel
from megatron_keye.train.weight_origins import counts, differences, fresh_modules, made_with, shapes_of, sources


def drawing(settings: ModelConfig) -> Callable[..., Tensor]:
    """How the model of a run is filled before anything is loaded: drawing 8 billion numbers for nothing takes minutes."""
    fresh = fresh_modules(settings)

    def draw(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
        return (initial_tensor if module_of(name) in fresh else no_tensor)(name, shape, std, seed)

    return draw


def start_from_elsewhere(model: KeyeModel, optimizer: ChainedOptimizer | None) -> list[str]:
    """Fill what the settings of a model of any layout take from elsewhere, and the main weights of its optimizer; returns notes for
    people: where each module comes from, and settings that its weights were not made with.

    A run directory stands for its newest checkpoint, whose optimizer state is not used. All ranks must call it. Raises CheckpointError
    on all of them where weights are damaged, or not those of this model.
    """
    found = sources(model.config.model)
    notes = [note for path, modules in found.items() for note in _load(path, modules, model)]
    if found and optimizer is not None:
        optimizer.reload_model_params()
    fresh = fresh_modules(model.config.model)
    return [*notes, f"fresh weights: {', '.join(fresh)}"] if found and fresh else notes


def _load(path: Path, modules: tuple[Module, ...], model: KeyeModel) -> list[str]:
    world, settings = model.groups.world, model.config.model
    pieces = [piece for piece in model.pieces() if module_of(piece.name) in modules]
    checkpoint = on_first_rank(world, lambda: find_checkpoint(path))
    if checkpoint is None:
        load_hf_weights(path, pieces, shapes_of(settings, modules), world, lambda name: counts(name, modules))
    else:
        load_weights(checkpoint, pieces, world)
    notes = differences(on_first_rank(world, lambda: made_with(path)), settings, modules)
    which = "weights" if len(modules) == len(MODULES) else f"weights of {', '.join(modules)}"
    return [f"the {which} come from {path}", *notes]
