"""Weights that a new run starts from: of Hugging Face folders, of checkpoints, of other runs, or fresh, for each module its own."""

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
from megatron_keye.config.schema import ModelConfig, Module
from megatron_keye.model.init import initial_tensor, no_tensor
from megatron_keye.model.modules import MODULES, module_of
from megatron_keye.model.tensors import canonical_shapes
from megatron_keye.train.build import KeyeModel

FRESH = "fresh"


def sources(settings: ModelConfig) -> dict[Path, tuple[Module, ...]]:
    """The modules that come from each folder. Those of none are drawn."""
    chosen = settings.init_parts.model_dump()
    found: dict[Path, tuple[Module, ...]] = {}
    for module in MODULES:
        place = chosen[module] or settings.init_from
        if place is not None and place != FRESH:
            found[Path(place)] = (*found.get(Path(place), ()), module)
    return found


def drawing(settings: ModelConfig) -> Callable[..., Tensor]:
    """How the model of a run is filled before anything is loaded: drawing 8 billion numbers for nothing takes minutes."""
    loaded = {module for modules in sources(settings).values() for module in modules}

    def draw(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
        return (no_tensor if module_of(name) in loaded else initial_tensor)(name, shape, std, seed)

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
    fresh = [module for module in MODULES if not any(module in modules for modules in found.values())]
    return [*notes, f"fresh weights: {', '.join(fresh)}"] if found and fresh else notes


def _load(path: Path, modules: tuple[Module, ...], model: KeyeModel) -> list[str]:
    world, settings = model.groups.world, model.config.model
    pieces = [piece for piece in model.pieces() if module_of(piece.name) in modules]
    checkpoint = on_first_rank(world, lambda: find_checkpoint(path))
    if checkpoint is None:
        shapes = {name: shape for name, shape in canonical_shapes(settings).items() if module_of(name) in modules}
        load_hf_weights(path, pieces, shapes, world, lambda name: _counts(name, modules))
    else:
        load_weights(checkpoint, pieces, world)
    made_with = on_first_rank(world, lambda: _model_of(path, checkpoint))
    differences = identity_problems(identity(made_with, ""), identity(settings, ""))
    if len(modules) == len(MODULES):
        return [f"the weights come from {path}", *differences]
    sections = {"decoder" if module == "embedding" else module for module in modules}
    return [f"the weights of {', '.join(modules)} come from {path}", *(text for text in differences if text.split(".")[0] in sections)]


def _counts(name: str, modules: tuple[Module, ...]) -> bool:
    """Whether a tensor in a folder has to be one of `modules`: every one has to, known or not, where all are loaded."""
    return len(modules) == len(MODULES) or module_of(name) in modules


def _model_of(path: Path, checkpoint: Path | None) -> ModelConfig:
    return read_hf_config(path) if checkpoint is None else stored_model(checkpoint, read_manifest(checkpoint))
