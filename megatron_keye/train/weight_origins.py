"""Where the weights of a new run come from, for each module its own folder, and whether what lies there fits. Reads no tensor."""

from collections.abc import Mapping
from pathlib import Path

from megatron_keye.checkpoint.convert import find_checkpoint, open_model
from megatron_keye.checkpoint.files import TensorSpec
from megatron_keye.checkpoint.hf_config import read_hf_config
from megatron_keye.checkpoint.identity import identity, stored_model
from megatron_keye.checkpoint.manifest import identity_problems, read_manifest
from megatron_keye.checkpoint.tensors import dtype_counts, require_shapes, total_bytes
from megatron_keye.config.schema import ModelConfig, Module
from megatron_keye.model.modules import MODULES, module_of
from megatron_keye.model.tensors import Shape, canonical_shapes

FRESH = "fresh"
OTHER = "no module"
"""Of tensors that no model of this kind has."""


def sources(settings: ModelConfig) -> dict[Path, tuple[Module, ...]]:
    """The modules that come from each folder. Those of none are drawn."""
    chosen = settings.init_parts.model_dump()
    found: dict[Path, tuple[Module, ...]] = {}
    for module in MODULES:
        place = chosen[module] or settings.init_from
        if place is not None and place != FRESH:
            found[Path(place)] = (*found.get(Path(place), ()), module)
    return found


def fresh_modules(settings: ModelConfig) -> tuple[Module, ...]:
    loaded = {module for modules in sources(settings).values() for module in modules}
    return tuple(module for module in MODULES if module not in loaded)


def shapes_of(settings: ModelConfig, modules: tuple[Module, ...]) -> dict[str, Shape]:
    """Every tensor of these modules."""
    return {name: shape for name, shape in canonical_shapes(settings).items() if module_of(name) in modules}


def counts(name: str, modules: tuple[Module, ...]) -> bool:
    """Whether a tensor in a folder has to be one of `modules`: every one has to, known or not, where all are loaded."""
    return len(modules) == len(MODULES) or module_of(name) in modules


def made_with(path: Path) -> ModelConfig:
    """The model whose weights are at `path`. Raises CheckpointError where nothing says so."""
    checkpoint = find_checkpoint(path)
    return read_hf_config(path) if checkpoint is None else stored_model(checkpoint, read_manifest(checkpoint))


def differences(found: ModelConfig, settings: ModelConfig, modules: tuple[Module, ...]) -> list[str]:
    """Sentences about settings of `modules` with which the weights of the model `found` were not made."""
    texts = identity_problems(identity(found, ""), identity(settings, ""))
    if len(modules) == len(MODULES):
        return texts
    sections = {"decoder" if module == "embedding" else module for module in modules}
    return [text for text in texts if text.split(".")[0] in sections]


def describe_origins(settings: ModelConfig) -> str:
    """What a new run would load from where, and what there it would not. Raises CheckpointError where that cannot be done: for a folder
    that is missing, cut off or holds no model, and with every tensor of these modules that is missing or has another shape."""
    lines = ["weights of a new run:"]
    for path, modules in sources(settings).items():
        specs = open_model(path).specs
        wanted = {name: spec for name, spec in specs.items() if counts(name, modules)}
        require_shapes(path, wanted, shapes_of(settings, modules))
        lines += [f"  from {path}:", *(_group_line(module, wanted) for module in modules)]
        ignored = {name: spec for name, spec in specs.items() if name not in wanted}
        lines += [f"    not loaded: {len(ignored)} tensors of {_modules_of(ignored)}"] if ignored else []
        lines += [f"    {text}" for text in differences(made_with(path), settings, modules)]
    fresh = fresh_modules(settings)
    return "\n".join([*lines, f"  fresh: {', '.join(fresh)}"] if fresh else lines)


def _group_line(module: Module, specs: Mapping[str, TensorSpec]) -> str:
    own = {name: spec for name, spec in specs.items() if module_of(name) == module}
    types = ", ".join(f"{number} {dtype}" for dtype, number in dtype_counts(own).items())
    return f"    {module}: {len(own)} tensors ({types}), {total_bytes(own) / 1e9:,.2f} GB"


def _modules_of(names: Mapping[str, TensorSpec]) -> str:
    return ", ".join(dict.fromkeys(module_of(name) or OTHER for name in names))
