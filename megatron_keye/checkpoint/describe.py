"""What a checkpoint or a Hugging Face folder holds, for people."""

from collections import Counter
from math import prod
from pathlib import Path

from megatron_keye.checkpoint.checkpoint_tensors import CheckpointTensors, is_converted
from megatron_keye.checkpoint.convert import open_model
from megatron_keye.checkpoint.hf_config import read_hf_config
from megatron_keye.checkpoint.tensors import TensorSource, dtype_counts, require_shapes, total_bytes
from megatron_keye.config.schema import ModelConfig
from megatron_keye.model.modules import MODULES, module_of
from megatron_keye.model.tensors import canonical_shapes


def describe(path: Path) -> str:
    """A few lines on what the folder is. Raises CheckpointError where it does not hold a whole model."""
    source = open_model(path)
    if isinstance(source, CheckpointTensors):
        kind = "converted checkpoint" if is_converted(source.path) else f"training checkpoint of step {source.manifest.run.step}"
        moments = "with" if source.manifest.steps else "without"
        lines = [f"{source.path}: {kind}, {moments} optimizer state, {len(source.manifest.files)} files"]
        model = source.model
    else:
        model = read_hf_config(source.folder)
        require_shapes(source.folder, source.specs, canonical_shapes(model))
        lines = [f"{source.folder}: Hugging Face folder, {len(source.files)} weight files"]
    return "\n".join([*lines, *_model_lines(model), *_tensor_lines(source)])


def _model_lines(model: ModelConfig) -> list[str]:
    vision, decoder = model.vision, model.decoder
    return [
        f"variant    {model.variant}",
        f"vision     {vision.num_layers} layers of {vision.hidden_size}, {vision.num_heads} heads, "
        f"{vision.position_table_side**2} positions",
        f"decoder    {decoder.num_layers} layers of {decoder.hidden_size}, {decoder.num_heads} heads in {decoder.num_kv_groups} groups, "
        f"vocabulary {decoder.vocab_size:,}, rope base {decoder.rope_base:,.0f}",
    ]


def _tensor_lines(source: TensorSource) -> list[str]:
    specs = source.specs
    parameters: Counter[str] = Counter()
    for name, spec in specs.items():
        parameters[module_of(name)] += prod(spec.shape)
    counts = ", ".join(f"{number} {dtype}" for dtype, number in dtype_counts(specs).items())
    shares = ", ".join(f"{module} {parameters[module]:,}" for module in MODULES)
    return [
        f"tensors    {len(specs)} ({counts}), {total_bytes(specs) / 1e9:,.2f} GB",
        f"parameters {sum(parameters.values()):,}: {shares}",
    ]
