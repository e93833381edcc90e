"""Conversion between Hugging Face folders and checkpoints: first checked, then streamed into a folder that appears whole.

A converted checkpoint is one without optimizer state that also holds, in `hf/`, everything of the Hugging Face folder but its
weights, so that the way back gives the same folder. A training checkpoint has no such files: they come from a template folder, or
from what the run was started with.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import megatron_keye
from megatron_keye.checkpoint.checkpoint_tensors import HF_FILES, CheckpointTensors, is_converted, write_checkpoint
from megatron_keye.checkpoint.files import OnBytes, flush_folder
from megatron_keye.checkpoint.hf_config import CONFIG_FILE, make_hf_config, model_of_hf_config, read_hf_config, update_hf_config
from megatron_keye.checkpoint.hf_files import HfFiles, carried_files, json_text, released_files, tokenizer_files
from megatron_keye.checkpoint.hf_weights import HfTensors, write_hf_weights
from megatron_keye.checkpoint.identity import identity, stored_settings
from megatron_keye.checkpoint.manifest import MANIFEST, Identity, RunRecord
from megatron_keye.checkpoint.new_folder import new_folder
from megatron_keye.checkpoint.store import find_damage, latest
from megatron_keye.checkpoint.tensors import Cast, TensorSource, require_shapes, total_bytes
from megatron_keye.config.json_file import read_json_object
from megatron_keye.config.schema import ModelConfig, RunConfig
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.errors import CheckpointError, SettingsError
from megatron_keye.model.tensors import canonical_shapes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
"""As config.json names them."""
TRAINED_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
"""Type of the weights that a run computes with, by `train.precision`."""
OTHER_FILES_BYTES = 100_000_000
"""Room for everything that is not weights."""


@dataclass(frozen=True)
class Conversion:
    """A conversion whose input has been checked; nothing is written yet."""

    model: ModelConfig
    tensors: TensorSource
    fill: Callable[[Path, OnBytes], None]
    """Writes all files into an empty folder, telling the bytes of tensors as they are done."""

    @property
    def num_bytes(self) -> int:
        """Of the tensors that will be written."""
        return total_bytes(self.tensors.specs)

    def write(self, output: Path, replace: bool = False, on_bytes: OnBytes = lambda num_bytes: None) -> None:
        """Make the folder `output`, whole or not at all. Raises CheckpointError as `new_folder` does."""
        with new_folder(output, self.num_bytes + OTHER_FILES_BYTES, replace) as folder:
            self.fill(folder, on_bytes)


def import_hf(source: Path) -> Conversion:
    """From a Hugging Face folder to a checkpoint that keeps every tensor in its own type.

    Raises CheckpointError or SettingsError for a folder that is damaged, of an unknown architecture, without a tokenizer, or with
    missing, unknown or misshapen tensors, all listed at once.
    """
    model, tensors = read_hf_config(source), HfTensors(source)
    require_shapes(source, tensors.specs, canonical_shapes(model))
    carried = HfFiles(carried_files(source))
    own_identity = identity(model, load_tokenizer(source, model.variant).fingerprint)
    settings = yaml.safe_dump({"model": model.model_dump(mode="json")}, sort_keys=False)
    run = RunRecord(step=0, resume_state="", settings=settings, ledger="", versions={"megatron_keye": megatron_keye.__version__})

    def fill(folder: Path, on_bytes: OnBytes) -> None:
        write_converted(folder, tensors, carried, run, own_identity, on_bytes)

    return Conversion(model, tensors, fill)


def write_converted(folder: Path, tensors: TensorSource, files: HfFiles, run: RunRecord, model: Identity, on_bytes: OnBytes) -> None:
    """Fill an empty folder as a converted checkpoint: `tensors`, and the other `files` of a Hugging Face folder."""
    (folder / HF_FILES).mkdir()
    files.write_to(folder / HF_FILES)
    flush_folder(folder / HF_FILES)
    write_checkpoint(folder, tensors, run, model, on_bytes)


def export_hf(path: Path, max_shard_bytes: int, dtype: str | None = None, template: Path | None = None) -> Conversion:
    """From a checkpoint of any layout, or a run's newest one, to a Hugging Face folder.

    `dtype` is one of `DTYPES`; None keeps every tensor's own type in a converted checkpoint, and takes the precision of the run in a
    training checkpoint, whose main weights are wider. Everything that is not weights comes from `template` where it is given, else from
    the checkpoint itself, else from the folder that the run started from, else from its tokenizer's folder.
    Raises CheckpointError for a checkpoint that is damaged or does not hold the whole model, and where those files cannot be found or
    are of another model. Checksums are compared while converting.
    """
    checkpoint = _require_checkpoint(path)
    stored = CheckpointTensors(checkpoint)
    dtype, files = beside_weights(stored, dtype, template)
    tensors = stored if dtype is None else Cast(stored, DTYPES[dtype])

    def fill(folder: Path, on_bytes: OnBytes) -> None:
        files.write_to(folder)
        with comparing_checksums([checkpoint]):
            write_hf_weights(folder, tensors, max_shard_bytes, on_bytes)

    return Conversion(stored.model, tensors, fill)


def beside_weights(source: CheckpointTensors | HfTensors, dtype: str | None, template: Path | None = None) -> tuple[str | None, HfFiles]:
    """The type that exported weights of `source` get, None for each tensor's own, and the other files of a Hugging Face folder.

    `dtype` and `template` as in `export_hf`. Raises CheckpointError where the files cannot be found or are of another model.
    """
    if isinstance(source, HfTensors):
        return dtype, _with_dtype(source.folder, dtype)
    run = None if is_converted(source.path) else stored_settings(source.path, source.manifest)
    if dtype is None and run is not None:
        dtype = TRAINED_DTYPES[run.train.precision]
    return dtype, _files_of(source, run, dtype, template)


@contextmanager
def comparing_checksums(checkpoints: Sequence[Path]) -> Iterator[None]:
    """Compare the checksums of `checkpoints` while the block reads them. Raises CheckpointError at its end, with every damaged file.

    Hashing leaves the interpreter's lock, so it takes no time from the block where there is a second core.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        damage = pool.map(find_damage, checkpoints)
        yield
    found = [problem for problems in damage for problem in problems]
    if found:
        raise CheckpointError("\n".join(found) + "\nUse an earlier checkpoint, or copy this one again.")


def _require_checkpoint(path: Path) -> Path:
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(f"{path} is neither a checkpoint (with {MANIFEST}) nor a run directory that has saved one")
    return checkpoint


def _files_of(stored: CheckpointTensors, run: RunConfig | None, dtype: str | None, template: Path | None) -> HfFiles:
    """`run` are the settings of the run that saved the checkpoint; None for a converted one."""
    trained_tokens = 0 if run is None else run.data.seq_length_tokens
    if template is not None:
        return _from_template(template, stored, trained_tokens, dtype)
    if run is None:
        return _from_template(stored.path / HF_FILES, stored, trained_tokens, dtype)
    if run.model.init_from is not None:
        for folder in (Path(run.model.init_from), Path(run.model.init_from) / HF_FILES):
            if (folder / CONFIG_FILE).is_file() and _has_tokenizer(folder, stored):
                return _from_template(folder, stored, trained_tokens, dtype)
    folder = Path(run.data.tokenizer)
    if not _has_tokenizer(folder, stored):
        raise CheckpointError(
            f"{stored.path} was trained with a tokenizer that is no longer in {folder}; name a Hugging Face folder of the same model with "
            "--template"
        )
    tokenizer = load_tokenizer(folder, stored.model.variant)
    config = make_hf_config(stored.model, tokenizer.vocab, trained_tokens) | {"torch_dtype": dtype}
    files = tokenizer_files(folder)
    return HfFiles(files.copied, files.written | released_files(stored.model.variant, tokenizer.specials, config))


def _has_tokenizer(folder: Path, stored: CheckpointTensors) -> bool:
    """Whether the tokenizer in `folder` is the one that the checkpoint was made with."""
    try:
        found = load_tokenizer(folder, stored.model.variant).fingerprint
    except SettingsError:
        return False
    return found == stored.manifest.model["tokenizer"]


def _from_template(folder: Path, stored: CheckpointTensors, trained_tokens: int, dtype: str | None) -> HfFiles:
    """The files of `folder`, with a config.json that says what the model is now; unchanged to the byte where it already does."""
    files = carried_files(folder)
    if not _has_tokenizer(folder, stored):
        raise CheckpointError(f"{folder} has another tokenizer than {stored.path} was made with; use a folder of the same model")
    raw = read_json_object(folder / CONFIG_FILE)
    shapes = {name: spec.shape for name, spec in stored.specs.items()}
    read = model_of_hf_config(raw, folder / CONFIG_FILE, shapes)
    config = update_hf_config(raw, read, stored.model)
    if trained_tokens > config.get("max_position_embeddings", 0):
        config |= {"max_position_embeddings": trained_tokens}
    if dtype is not None:
        config |= {_dtype_key(raw): dtype}
    return HfFiles(files, {} if config == raw else {CONFIG_FILE: json_text(config)})


def _with_dtype(folder: Path, dtype: str | None) -> HfFiles:
    """The files of a Hugging Face folder, whose config.json says that the weights have the type `dtype`."""
    raw = read_json_object(folder / CONFIG_FILE)
    config = raw | ({} if dtype is None else {_dtype_key(raw): dtype})
    return HfFiles(carried_files(folder), {} if config == raw else {CONFIG_FILE: json_text(config)})


def _dtype_key(config: Mapping[str, Any]) -> str:
    """Older versions of transformers call it torch_dtype."""
    return "dtype" if "dtype" in config else "torch_dtype"


def find_checkpoint(path: Path) -> Path | None:
    """`path` where it is a checkpoint, the newest one where it is a run directory or a folder of checkpoints; else None."""
    if (path / MANIFEST).is_file():
        return path
    return latest(path / "checkpoints") or latest(path)


def open_model(path: Path) -> CheckpointTensors | HfTensors:
    """The weights of a checkpoint, of a run's newest checkpoint, or of a Hugging Face folder. Raises CheckpointError for anything else."""
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        return CheckpointTensors(checkpoint)
    if (path / CONFIG_FILE).is_file():
        return HfTensors(path)
    raise CheckpointError(
        f"{path} holds no model: expected a checkpoint (with {MANIFEST}), a run directory with one, or a Hugging Face folder "
        f"(with {CONFIG_FILE})"
    )
