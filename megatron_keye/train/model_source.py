"""Where a trained model comes from: a run, one of its checkpoints, or a released-style Hugging Face folder.

Each brings its own settings, tokenizer, chat template and media limits, so that it is shown what it was trained on.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_keye.checkpoint.checkpoint_tensors import HF_FILES, is_converted
from megatron_keye.checkpoint.hf_config import CONFIG_FILE as HF_CONFIG
from megatron_keye.checkpoint.hf_config import read_hf_config, read_max_positions
from megatron_keye.checkpoint.hf_weights import load_hf_weights
from megatron_keye.checkpoint.identity import stored_model, stored_settings
from megatron_keye.checkpoint.load import load_weights
from megatron_keye.checkpoint.manifest import MANIFEST, read_manifest
from megatron_keye.config.schema import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from megatron_keye.data.chat_template import find_chat_template
from megatron_keye.data.items import MediaRules, media_rules
from megatron_keye.data.processor_config import read_media_rules
from megatron_keye.data.rendered import TemplateTokenizer
from megatron_keye.data.sample_list import Tokenize
from megatron_keye.data.tokenize import tokenize
from megatron_keye.data.tokenizer import KeyeTokenizer, load_tokenizer
from megatron_keye.errors import CheckpointError
from megatron_keye.model.tensors import canonical_shapes
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.serving import Fill, for_one_process, latest_checkpoint, run_settings, trained_tokenizer


@dataclass(frozen=True)
class ModelSource:
    """A model that is not built yet, and how its inputs are made. `config` is for one process."""

    config: RunConfig
    tokenizer: KeyeTokenizer
    tokenize: Tokenize
    rules: MediaRules
    max_tokens: int
    """Most tokens of a sample that the model was made for."""
    fill: Fill


def find_model(path: str | Path) -> ModelSource:
    """The model of a run directory (its latest checkpoint), of a checkpoint, or of a Hugging Face folder.

    Raises CheckpointError or SettingsError for a folder that is none of these, is damaged, or lacks something.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _from_converted(path) if is_converted(path) else _from_checkpoint(path, stored_settings(path, read_manifest(path)))
    if (path / HF_CONFIG).is_file():
        return _from_hf_folder(path)
    run = RunDir(path)
    if run.config.is_file():
        return _from_checkpoint(latest_checkpoint(run), run_settings(run))
    raise CheckpointError(
        f"{path} holds no model: expected a run directory (with {run.config.name}), a checkpoint (with {MANIFEST}) or a "
        f"Hugging Face folder (with {HF_CONFIG})"
    )


def _from_checkpoint(checkpoint: Path, settings: RunConfig) -> ModelSource:
    config = for_one_process(settings)
    variant, data = config.model.variant, config.data
    tokenizer = trained_tokenizer(checkpoint, config)
    return ModelSource(
        config,
        tokenizer,
        tokenize=partial(tokenize, tokenizer=tokenizer, variant=variant),
        rules=media_rules(data.image, data.video, variant),
        max_tokens=data.seq_length_tokens,
        fill=partial(load_weights, checkpoint),
    )


def _from_converted(checkpoint: Path) -> ModelSource:
    """Its weights, and everything else as of the Hugging Face folder that it was converted from."""
    model = stored_model(checkpoint, read_manifest(checkpoint))
    return _with_folder(checkpoint / HF_FILES, model, partial(load_weights, checkpoint))


def _from_hf_folder(folder: Path) -> ModelSource:
    model = read_hf_config(folder)
    return _with_folder(folder, model, partial(load_hf_weights, folder, shapes=canonical_shapes(model)))


def _with_folder(folder: Path, model: ModelConfig, fill: Fill) -> ModelSource:
    """A model whose inputs are made as the files of a Hugging Face folder say."""
    max_tokens = read_max_positions(folder)
    tokenizer = load_tokenizer(folder, model.variant)
    if tokenizer.vocab_size > model.decoder.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids, and the model {model.decoder.vocab_size}; copy both from one model"
        )
    return ModelSource(
        _settings_around(model, folder, max_tokens),
        tokenizer,
        tokenize=_folder_tokenize(folder, tokenizer, model),
        rules=read_media_rules(folder, model.variant),
        max_tokens=max_tokens,
        fill=fill,
    )


def _folder_tokenize(folder: Path, tokenizer: KeyeTokenizer, model: ModelConfig) -> Tokenize:
    """By the folder's own template; by that of the first release where it has none."""
    template = find_chat_template(folder)
    if template is None:
        return partial(tokenize, tokenizer=tokenizer, variant=model.variant)
    return TemplateTokenizer(template, tokenizer, model.variant).tokenize


def _settings_around(model: ModelConfig, folder: Path, max_tokens: int) -> RunConfig:
    """Settings of a run that only looks: those of data and training are there because building asks for them."""
    pad_multiple_tokens = 2
    data = DataConfig(
        train=str(folder), tokenizer=str(folder), seq_length_tokens=max_tokens // pad_multiple_tokens * pad_multiple_tokens,
        pad_multiple_tokens=pad_multiple_tokens, global_batch_samples=1,
    )  # fmt: skip
    return RunConfig(model=model, data=data, optimizer=OptimizerConfig(lr=1e-6), train=TrainConfig(steps=1, precision="fp32"))
