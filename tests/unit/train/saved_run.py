"""A run directory with one checkpoint, of the weights that `hf_folder` writes."""

from pathlib import Path

import yaml

from megatron_keye.checkpoint.identity import identity
from megatron_keye.checkpoint.manifest import RunRecord
from megatron_keye.checkpoint.store import Keep, save_checkpoint
from megatron_keye.config.load import dump_config, load_config
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.train.checkpointing import training_state
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.serving import build_filled
from tests.unit.checkpoint.hf_folder import small_model, tensors_of
from tests.unit.train.forked import in_a_fork

STEP = 7


def save_run(path: Path, tokenizer_folder: Path, variant: str) -> Path:
    """Writes the run as training does; its checkpoint."""
    settings = {
        "model": small_model(variant).model_dump(mode="json"),
        "data": {
            "train": "none",
            "tokenizer": str(tokenizer_folder),
            "seq_length_tokens": 768,
            "pad_multiple_tokens": 16,
            "global_batch_samples": 1,
        },
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 9, "precision": "fp32"},
    }
    run = RunDir(path)
    run.create()
    run.config.write_text(yaml.safe_dump(settings))
    config = load_config(str(run.config))
    return in_a_fork(_save, run, config, load_tokenizer(tokenizer_folder, variant).fingerprint)


def _save(run, config, fingerprint):
    weights = tensors_of(config.model)
    model = build_filled(config, lambda pieces: [piece.write(weights[piece.name]) for piece in pieces])
    record, model_identity = RunRecord(STEP, "{}", dump_config(config), "", {}), identity(config.model, fingerprint)
    return save_checkpoint(run.checkpoints, training_state(model, None), record, model_identity, Keep(1))
