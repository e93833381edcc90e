"""A trained model on one process, ready to run forward: what scoring and evaluation share.

The layout that a model was trained with does not matter here. Whoever opens a model calls `runtime.stop` when done with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_keye.checkpoint.load import load_weights
from megatron_keye.checkpoint.manifest import read_manifest
from megatron_keye.checkpoint.store import latest
from megatron_keye.config.load import load_config
from megatron_keye.config.schema import KernelConfig, ParallelConfig, RunConfig
from megatron_keye.data.tokenizer import KeyeTokenizer, load_tokenizer
from megatron_keye.errors import CheckpointError, SettingsError
from megatron_keye.model.init import no_tensor
from megatron_keye.model.names import Piece
from megatron_keye.train import runtime
from megatron_keye.train.build import KeyeModel, build_model
from megatron_keye.train.run_dir import RunDir

EVERY_MODULE = ("vision", "projector", "embedding", "decoder")
Fill = Callable[[list[Piece]], object]
"""Writes the weights of a model into its pieces."""


@dataclass(frozen=True)
class OpenedRun:
    """A run's model as of its latest checkpoint. `config` are the run's settings with the layout of one process."""

    model: KeyeModel
    tokenizer: KeyeTokenizer
    config: RunConfig
    step: int


def open_run(run_dir: str | Path, overrides: Sequence[str] = ()) -> OpenedRun:
    """Load the latest checkpoint of a run on this process, with the run's own precision.

    `overrides` change settings as `--set` does. Raises SettingsError for a folder that is no run or a missing tokenizer,
    CheckpointError where there is no checkpoint, or it is damaged or of another model or tokenizer.
    """
    run = RunDir(run_dir)
    config = for_one_process(run_settings(run, overrides))
    checkpoint = latest_checkpoint(run)
    tokenizer = trained_tokenizer(checkpoint, config)
    model = build_filled(config, lambda pieces: load_weights(checkpoint, pieces))
    return OpenedRun(model, tokenizer, config, read_manifest(checkpoint).run.step)


def run_settings(run: RunDir, overrides: Sequence[str] = ()) -> RunConfig:
    """Settings that the run last started with, changed by `overrides`. Raises SettingsError for a folder that is no run."""
    if not run.config.is_file():
        raise SettingsError(f"{run.path} is not a run directory: it has no {run.config.name}; give the --run-dir of `keye train`")
    return load_config(str(run.config), overrides)


def latest_checkpoint(run: RunDir) -> Path:
    """Raises CheckpointError where the run has saved none."""
    checkpoint = latest(run.checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"{run.checkpoints} holds no checkpoint; let the run reach its first one, or touch {run.path}/SAVE")
    return checkpoint


def trained_tokenizer(checkpoint: Path, config: RunConfig) -> KeyeTokenizer:
    """The tokenizer of `config`. Raises CheckpointError unless it is the one that the checkpoint was trained with."""
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.variant)
    trained_with = read_manifest(checkpoint).model["tokenizer"]
    if trained_with != tokenizer.fingerprint:
        raise CheckpointError(
            f"{checkpoint} was trained with a tokenizer of fingerprint {trained_with}, but {config.data.tokenizer} has "
            f"{tokenizer.fingerprint}; restore that folder, or name the right one as data.tokenizer"
        )
    return tokenizer


def for_one_process(config: RunConfig) -> RunConfig:
    """The same run on a single process, on whatever kernels this machine has."""
    one = {
        "parallel": ParallelConfig(),
        "kernels": KernelConfig(),
        "encode": config.encode.model_copy(update={"placement": "all_ranks"}),
    }
    return config.model_copy(update=one)


def build_filled(config: RunConfig, fill: Fill) -> KeyeModel:
    """The whole model with the weights that `fill` writes, without gradients. Joins a world of one process."""
    if runtime.world_size_from_environment() > 1:
        raise SettingsError("this command runs on one process; start it without torchrun")
    started = runtime.start(config)
    frozen = config.model_copy(update={"model": config.model.model_copy(update={"freeze": EVERY_MODULE})})
    model = build_model(frozen, started.groups, started.device, draw=no_tensor)
    fill(model.pieces())
    return model
