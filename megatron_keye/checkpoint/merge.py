"""Merged models: sums of the tensors of several, computed a few rows at a time, in float64, and rounded once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from torch import Tensor

import megatron_keye
from megatron_keye.checkpoint.checkpoint_tensors import CheckpointTensors
from megatron_keye.checkpoint.convert import DTYPES, Conversion, beside_weights, comparing_checksums, open_model, write_converted
from megatron_keye.checkpoint.files import OnBytes, TensorSpec
from megatron_keye.checkpoint.hf_config import read_hf_config
from megatron_keye.checkpoint.hf_weights import HfTensors, write_hf_weights
from megatron_keye.checkpoint.identity import identity
from megatron_keye.checkpoint.manifest import Identity, RunRecord
from megatron_keye.checkpoint.merge_recipe import Mix, Recipe, assign
from megatron_keye.checkpoint.tensors import TensorSource, require_shapes
from megatron_keye.config.schema import ModelConfig
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.errors import CheckpointError, SettingsError
from megatron_keye.model.tensors import canonical_shapes

Format = Literal["hf", "native"]


@dataclass(frozen=True)
class Merged:
    """Sums of tensors of the same name. One alone with factor 1 is copied to the bit where its type is the result's."""

    specs: Mapping[str, TensorSpec]
    sources: Mapping[str, TensorSource]
    """By model."""
    mixes: Mapping[str, Mix]
    """By tensor."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        mix, dtype = self.mixes[name], self.specs[name].dtype
        blocks = {model: self.sources[model].read_rows(name, start, stop) for model in mix.factors}
        first = next(iter(blocks.values()))
        if list(mix.factors.values()) == [mix.divisor] and first.dtype == dtype:
            return first
        total = torch.zeros(first.shape, dtype=torch.float64)
        for model, block in blocks.items():
            # As floats: torch has no integers above 64 bits.
            total.add_(block.double(), alpha=float(mix.factors[model]))
        return rounded(total.div_(float(mix.divisor)), dtype)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 `values` in another type, with one rounding.

    torch goes to 16-bit types by way of float32, whose rounding can make ties, which then go the wrong way. Rounding to odd on the way
    makes none: a float32 that is not exact gets an odd last bit, and its other bits are those of the value cut off.
    """
    if dtype.itemsize > 2:
        return values.to(dtype)
    single = values.float()
    is_exact = single.double() == values
    cut_off = single.view(torch.int32) - (single.abs() > values.abs()).int()
    return torch.where(is_exact, single.view(torch.int32), cut_off | 1).view(torch.float32).to(dtype)


@dataclass(frozen=True)
class _Model:
    path: Path
    tensors: CheckpointTensors | HfTensors
    settings: ModelConfig
    identity: Identity


def plan_merge(recipe: Recipe, file_format: Format, max_shard_bytes: int, dtype: str | None = None) -> Conversion:
    """A merge whose inputs have been checked; nothing is written yet.

    `dtype` is one of `convert.DTYPES`; None takes the types of the model that the recipe names as pattern, and the precision of its run
    where that is a training checkpoint. Raises SettingsError where the rules do not fit the tensors, and CheckpointError with every
    model that cannot be read and every difference between them.
    """
    models = _open_all(recipe)
    pattern = models[recipe.pattern_model]
    dtype, files = beside_weights(pattern.tensors, dtype)
    specs = {name: TensorSpec(spec.shape, spec.dtype if dtype is None else DTYPES[dtype]) for name, spec in pattern.tensors.specs.items()}
    mixes = {name: rule.mix() for name, rule in assign(recipe, specs).items()}
    merged = Merged(specs, {name: model.tensors for name, model in models.items()}, mixes)
    checkpoints = [model.tensors.path for model in models.values() if isinstance(model.tensors, CheckpointTensors)]

    def fill(folder: Path, on_bytes: OnBytes) -> None:
        with comparing_checksums(checkpoints):
            if file_format == "hf":
                files.write_to(folder)
                write_hf_weights(folder, merged, max_shard_bytes, on_bytes)
            else:
                write_converted(folder, merged, files, _record(recipe, pattern), pattern.identity, on_bytes)

    return Conversion(pattern.settings, merged, fill)


def describe_merge(recipe: Recipe, specs: Mapping[str, TensorSpec]) -> list[str]:
    """A line for each rule: what it computes, and of how many tensors."""
    rules = assign(recipe, specs)
    lines = []
    for rule in recipe.rules:
        names = [name for name, own in rules.items() if own is rule]
        num_bytes = sum(specs[name].num_bytes for name in names)
        mix = rule.mix()
        text = " + ".join(f"{factor / mix.divisor:.4g} {model}" for model, factor in mix.factors.items())
        lines.append(f"{', '.join(rule.tensors)}: {text}; {len(names)} tensors, {num_bytes / 1e9:,.2f} GB")
    return lines


def _open_all(recipe: Recipe) -> dict[str, _Model]:
    models: dict[str, _Model] = {}
    problems = []
    for name, path in recipe.models.items():
        try:
            models[name] = _open(Path(path))
        except (CheckpointError, SettingsError) as error:
            problems.append(f"{name}: {error}")
    pattern = models.get(recipe.pattern_model)
    for name, model in models.items():
        if pattern is not None:
            problems += [f"{name}: {difference}" for difference in _differences(model.identity, pattern.identity, recipe.pattern_model)]
    if problems:
        raise CheckpointError("These models cannot be merged:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return models


def _open(path: Path) -> _Model:
    tensors = open_model(path)
    if isinstance(tensors, CheckpointTensors):
        return _Model(path, tensors, tensors.model, identity(tensors.model, str(tensors.manifest.model["tokenizer"])))
    settings = read_hf_config(path)
    require_shapes(path, tensors.specs, canonical_shapes(settings))
    return _Model(path, tensors, settings, identity(settings, load_tokenizer(path, settings.variant).fingerprint))


def _differences(own: Identity, pattern: Identity, pattern_name: str) -> list[str]:
    return [
        f"{name} is {own.get(name, 'absent')!r}, and {pattern.get(name, 'absent')!r} in {pattern_name}"
        for name in sorted({*own, *pattern})
        if own.get(name) != pattern.get(name)
    ]


def _record(recipe: Recipe, pattern: _Model) -> RunRecord:
    """A converted checkpoint's, which also says what was merged."""
    settings = {"model": pattern.settings.model_dump(mode="json"), "merged": recipe.model_dump(mode="json", exclude_defaults=True)}
    versions = {"megatron_keye": megatron_keye.__version__}
    return RunRecord(step=0, resume_state="", settings=yaml.safe_dump(settings, sort_keys=False), ledger="", versions=versions)
