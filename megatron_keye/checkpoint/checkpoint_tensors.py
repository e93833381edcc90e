"""Weights of a checkpoint as whole tensors under their canonical names, and checkpoints that are written from such tensors."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_keye.checkpoint.files import (
    DTYPE_NAMES,
    DTYPES,
    FileRecord,
    OnBytes,
    TensorSpec,
    flush_folder,
    size_damage,
    write_recorded,
    write_text,
)
from megatron_keye.checkpoint.identity import stored_model
from megatron_keye.checkpoint.load import CheckpointReader
from megatron_keye.checkpoint.manifest import MANIFEST, WEIGHT, Identity, PartRecord, RunRecord, merge, read_manifest
from megatron_keye.checkpoint.ranges import Rectangle, matrix_shape
from megatron_keye.checkpoint.state import part_key
from megatron_keye.checkpoint.tensors import TensorSource, divide, require_shapes, row_blocks
from megatron_keye.errors import CheckpointError
from megatron_keye.model.tensors import canonical_shapes

MAX_FILE_BYTES = 5_000_000_000
HF_FILES = "hf"
"""Folder in a converted checkpoint with everything of the Hugging Face folder but its weights."""


class CheckpointTensors:
    """The weights of a checkpoint that any layout saved, as a `TensorSource`. Checksums are not looked at (`store.find_damage`)."""

    def __init__(self, path: Path):
        """Raises CheckpointError where the manifest is damaged, files are missing or cut off, or tensors are missing, unexpected or of
        the wrong shape."""
        self.path = path
        self.manifest = read_manifest(path)
        torn = [problem for record in self.manifest.files if (problem := size_damage(path, record))]
        if torn:
            raise CheckpointError("\n".join(torn) + "\nUse an earlier checkpoint, or copy this one again.")
        self.model = stored_model(path, self.manifest)
        stored = {
            key.removeprefix(f"{WEIGHT}/"): TensorSpec(record.shape, DTYPES[record.dtype])
            for key, record in self.manifest.tensors.items()
            if key.startswith(f"{WEIGHT}/")
        }
        wanted = canonical_shapes(self.model)
        require_shapes(path, stored, wanted)
        # A conversion keeps the order that it found; ranks save theirs in no order that means anything.
        self.specs = stored if is_converted(path) else {name: stored[name] for name in wanted}
        self._reader = CheckpointReader(path, self.manifest)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        spec = self.specs[name]
        wanted = Rectangle(start, 0, stop - start, matrix_shape(spec.shape)[1])
        key = f"{WEIGHT}/{name}"
        whole = self._reader.rows(key, wanted)
        if whole is not None:
            return whole
        rows = torch.empty(wanted.num_rows, wanted.num_columns, dtype=spec.dtype)
        self._reader.read(key, wanted, rows)
        return rows


def is_converted(path: Path) -> bool:
    """Whether a conversion wrote the checkpoint, rather than a run: then it holds the other files of the Hugging Face folder."""
    return (path / HF_FILES).is_dir()


def write_checkpoint(folder: Path, source: TensorSource, run: RunRecord, model: Identity, on_bytes: OnBytes) -> None:
    """Stream the weights of `source` into an empty folder as a checkpoint without optimizer state. Host memory used: one chunk."""
    written = []
    for number, specs in enumerate(divide(source.specs, MAX_FILE_BYTES)):
        path = folder / f"weights_{number:05d}.safetensors"
        file = _write_file(path, source, specs, on_bytes)
        written.append((file, [_part(name, spec) for name, spec in specs.items()]))
    write_text(folder / MANIFEST, merge(run, model, written).to_json())
    flush_folder(folder)


def _write_file(path: Path, source: TensorSource, specs: dict[str, TensorSpec], on_bytes: OnBytes) -> FileRecord:
    names = {part_key(WEIGHT, name, Rectangle(0, 0, *matrix_shape(spec.shape))): name for name, spec in specs.items()}
    matrices = {key: TensorSpec(matrix_shape(specs[name].shape), specs[name].dtype) for key, name in names.items()}

    def chunks(key: str) -> Iterator[Tensor]:
        return row_blocks(source, names[key])

    return write_recorded(path, matrices, chunks, on_block=lambda block: on_bytes(len(block)))


def _part(name: str, spec: TensorSpec) -> PartRecord:
    rows, columns = matrix_shape(spec.shape)
    return PartRecord(f"{WEIGHT}/{name}", spec.shape, DTYPE_NAMES[spec.dtype], rows * columns, step=None)
