"""What makes two models the same, and the model that a checkpoint holds."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from megatron_keye.checkpoint.manifest import Manifest
from megatron_keye.config.schema import ModelConfig, RunConfig, Section
from megatron_keye.config.strict_yaml import parse_yaml
from megatron_keye.errors import CheckpointError

Settings = TypeVar("Settings", bound=Section)
NOT_IDENTITY = ("freeze", "init_from", "init_std", "vision.recompute", "decoder.recompute")
"""Settings of the model that may change between saving and loading."""


def identity(model: ModelConfig, tokenizer: str) -> dict[str, int | float | str]:
    """Variant and sizes by dotted name, and the fingerprint of the tokenizer."""
    values = {name: value for name, value in _flatten(model.model_dump(exclude={"init_parts"}), "") if name not in NOT_IDENTITY}
    return {**values, "tokenizer": tokenizer}


def stored_model(path: Path, manifest: Manifest) -> ModelConfig:
    """The model of the checkpoint at `path`. Raises CheckpointError where its settings are not of this version."""
    return _validated(path, ModelConfig, parse_yaml(manifest.run.settings)["model"])


def stored_settings(path: Path, manifest: Manifest) -> RunConfig:
    """The settings of the run that saved the checkpoint at `path`; a converted one has none. Raises CheckpointError as `stored_model`."""
    return _validated(path, RunConfig, parse_yaml(manifest.run.settings))


def _validated(path: Path, section: type[Settings], values: object) -> Settings:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"{path} was saved with settings that this version does not have; use that version: {error}") from error


def _flatten(settings: Mapping, prefix: str) -> Iterable[tuple[str, int | float | str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value) if isinstance(value, tuple) else value
