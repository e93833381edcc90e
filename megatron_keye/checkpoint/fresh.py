"""A new Keye-VL model from a plain Qwen3 and a plain SigLIP, both as Hugging Face folders.

The ViT, its position table (which is interpolated to each image) and the pooling head come from SigLIP, the decoder from Qwen3, all in
the type of Qwen3's embedding. The projector is drawn. The variant's tokens that Qwen3 lacks get ids after its own, and their rows in the
embedding and output tables are the mean of the rows of Qwen3's tokens plus a tenth of those rows' standard deviation as noise, so that
they start within the model's distribution and apart from each other. `packing_position_embedding`, which nothing reads, is drawn too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_keye.checkpoint.convert import Conversion
from megatron_keye.checkpoint.files import OnBytes, TensorSpec
from megatron_keye.checkpoint.fresh_tokenizer import add_keye_tokens
from megatron_keye.checkpoint.hf_config import (
    CARRIED,
    CLASSES,
    CONFIG_FILE,
    make_hf_config,
    model_of_hf_config,
    read_max_positions,
    rope_settings,
)
from megatron_keye.checkpoint.hf_files import HfFiles, released_files
from megatron_keye.checkpoint.hf_weights import HfTensors, write_hf_weights
from megatron_keye.checkpoint.tensors import Cast, Combined, MemoryTensors, Renamed, TensorSource, require_shapes, row_ranges
from megatron_keye.config.json_file import read_json_object
from megatron_keye.config.schema import ModelConfig, Variant
from megatron_keye.contract.tokens import SpecialTokens
from megatron_keye.errors import CheckpointError
from megatron_keye.model.init import initial_tensor
from megatron_keye.model.tensors import canonical_shapes

QWEN3_TYPES, SIGLIP_TYPES = ("qwen3",), ("siglip", "siglip_vision_model")
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
VISUAL, SIGLIP_PREFIX = "visual.vision_model.", "vision_model."
ROWS_MULTIPLE = 64
"""Tables that must grow get a multiple of this many rows."""
NOISE = 0.1
"""Of new rows, in standard deviations of the old ones."""
CARRIED_ROWS = 32768


def new_hf(llm: Path, vision: Path, variant: Variant, seed: int, max_shard_bytes: int) -> Conversion:
    """The conversion that writes a whole Hugging Face folder of `variant`.

    Raises CheckpointError or SettingsError for folders that are not of these models, are damaged or incomplete.
    """
    config = _typed_config(llm, QWEN3_TYPES)
    tokenizer = add_keye_tokens(llm, variant)
    num_rows = config.get("vocab_size", 0)
    grown = tokenizer.num_ids > num_rows
    if grown:
        num_rows = -(-tokenizer.num_ids // ROWS_MULTIPLE) * ROWS_MULTIPLE
    model = _model(variant, config | {"vocab_size": num_rows}, llm, vision)
    new_rows = (tokenizer.num_old_ids, num_rows if grown else tokenizer.num_ids)
    tensors = _tensors(model, HfTensors(llm), HfTensors(vision), new_rows, seed)
    require_shapes(f"{llm} with {vision}", tensors.specs, canonical_shapes(model))
    dtype = str(tensors.dtype).removeprefix("torch.")
    hf_config = make_hf_config(model, tokenizer.vocab, read_max_positions(llm)) | {"torch_dtype": dtype}
    released = released_files(variant, SpecialTokens.from_vocab(tokenizer.vocab, variant), hf_config)
    files = HfFiles(tokenizer.files.copied, tokenizer.files.written | released)

    def fill(folder: Path, on_bytes: OnBytes) -> None:
        files.write_to(folder)
        write_hf_weights(folder, tensors, max_shard_bytes, on_bytes)

    return Conversion(model, tensors, fill)


@dataclass(frozen=True)
class GrownTable:
    """The table `old_name` of `source` as tensor `name` with other rows in the range `new_rows`, which may lie after its last one."""

    source: TensorSource
    old_name: str
    name: str
    num_rows: int
    new_rows: tuple[int, int]
    """[start, stop) of the rows that are new; every row before `start` is of a token that was trained."""
    seed: int

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        old = self.source.specs[self.old_name]
        return {self.name: TensorSpec((self.num_rows, *old.shape[1:]), old.dtype)}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = torch.empty(stop - start, self._fresh.shape[1], dtype=self.specs[name].dtype)
        first, last = self.new_rows
        for low, high in ((start, min(stop, first)), (max(start, last), stop)):
            if low < high:
                rows[low - start : high - start] = self.source.read_rows(self.old_name, low, high)
        low, high = max(start, first), min(stop, last)
        if low < high:
            rows[low - start : high - start] = self._fresh[low - first : high - first]
        return rows

    @cached_property
    def _fresh(self) -> Tensor:
        """float64 [number of new rows, columns]."""
        num_old = self.new_rows[0]
        total = squares = 0.0
        for start, stop in row_ranges(self.source.specs[self.old_name]):
            block = self.source.read_rows(self.old_name, start, min(stop, num_old)).double()
            total, squares = total + block.sum(0), squares + block.square().sum(0)
            if stop >= num_old:
                break
        mean = total / num_old
        deviation = (squares / num_old - mean.square()).clamp(min=0).sqrt()
        noise = initial_tensor(self.name, (self.new_rows[1] - num_old, len(mean)), NOISE, self.seed)
        return mean + deviation * noise


def _model(variant: Variant, config: dict[str, Any], llm: Path, vision: Path) -> ModelConfig:
    """As if the two config.json were one of Keye's, so that the same rules hold for it."""
    siglip = _typed_config(vision, SIGLIP_TYPES)
    tower = siglip.get("vision_config", siglip)
    half = config.get("head_dim", 0) // 2
    section = [half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2]
    architecture, model_type = CLASSES[variant]
    joined = config | {
        "architectures": [architecture], "model_type": model_type, "tie_word_embeddings": False, "vision_config": tower,
        "rope_parameters": rope_settings(config) | {"mrope_section": section}, "rope_scaling": None,
    }  # fmt: skip
    return model_of_hf_config(joined, llm / CONFIG_FILE, {CARRIED: (CARRIED_ROWS, tower.get("hidden_size", 0))})


def _typed_config(folder: Path, types: tuple[str, ...]) -> dict[str, Any]:
    config = read_json_object(folder / CONFIG_FILE)
    if config.get("model_type") not in types:
        raise CheckpointError(f"{folder} is of model type {config.get('model_type')!r}, expected {' or '.join(types)}; name another folder")
    return config


def _tensors(model: ModelConfig, llm: HfTensors, vision: HfTensors, new_rows: tuple[int, int], seed: int) -> Cast:
    """In the type of the language model's embedding. Tensors that a folder lacks are left out."""
    shapes = canonical_shapes(model)
    drawn = [name for name in shapes if name.startswith("mlp_AR.") or name == CARRIED]
    prefix = SIGLIP_PREFIX if any(name.startswith(SIGLIP_PREFIX) for name in vision.specs) else ""
    visual = {name: prefix + name.removeprefix(VISUAL) for name in shapes if name.startswith(VISUAL)}
    # Small Qwen3 models use one table for both ends.
    tables = {EMBEDDING: EMBEDDING, OUTPUT: OUTPUT if OUTPUT in llm.specs else EMBEDDING}
    if EMBEDDING not in llm.specs:
        raise CheckpointError(f"{llm.folder} has no {EMBEDDING}; expected the weights of a Qwen3 model with its output layer")
    layers = {name: name for name in shapes if name.startswith("model.") and name not in tables}
    grown = [GrownTable(llm, old, name, model.decoder.vocab_size, new_rows, seed) for name, old in tables.items()]
    combined = Combined(
        (
            Renamed(vision, {new: old for new, old in visual.items() if old in vision.specs}),
            MemoryTensors({name: initial_tensor(name, shapes[name], model.init_std, seed) for name in drawn}),
            *grown,
            Renamed(llm, {new: old for new, old in layers.items() if old in llm.specs}),
        )
    )
    return Cast(combined, llm.specs[EMBEDDING].dtype)
