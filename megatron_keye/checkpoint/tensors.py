"""Named tensors of any origin, read a few rows at a time: what conversion, comparison and merging are made of.

A source is a folder of Hugging Face weights (`hf_weights.HfTensors`), a checkpoint of any layout
(`checkpoint_tensors.CheckpointTensors`), or computed from other sources, like `Cast`. Writers take a source and hold one chunk.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from megatron_keye.checkpoint.files import CHUNK_BYTES, DTYPE_NAMES, TensorSpec
from megatron_keye.checkpoint.ranges import matrix_shape
from megatron_keye.errors import CheckpointError


class TensorSource(Protocol):
    """Tensors by name. Each counts as a matrix: its first dimension is the rows, all others together are the columns."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Shape and type of every tensor, in the order in which they should be written."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as [stop - start, columns] in the tensor's type. May be a view of a file: not to be written to."""


@dataclass(frozen=True)
class MemoryTensors:
    """Tensors that are in memory."""

    tensors: Mapping[str, Tensor]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self.tensors[name].detach()
        return tensor.reshape(matrix_shape(tuple(tensor.shape)))[start:stop]


@dataclass(frozen=True)
class Cast:
    """The tensors of `source`, rounded to one type."""

    source: TensorSource
    dtype: torch.dtype

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(spec.shape, self.dtype) for name, spec in self.source.specs.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.read_rows(name, start, stop).to(self.dtype)


@dataclass(frozen=True)
class Renamed:
    """Some tensors of `source` under other names."""

    source: TensorSource
    old_names: Mapping[str, str]
    """By new name."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {new: self.source.specs[old] for new, old in self.old_names.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.read_rows(self.old_names[name], start, stop)


@dataclass(frozen=True)
class Combined:
    """The tensors of several sources, whose names differ."""

    sources: tuple[TensorSource, ...]

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: spec for source in self.sources for name, spec in source.specs.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._source_of[name].read_rows(name, start, stop)

    @cached_property
    def _source_of(self) -> dict[str, TensorSource]:
        return {name: source for source in self.sources for name in source.specs}


def row_ranges(spec: TensorSpec, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """[start, stop) of the blocks of rows that a tensor is read in: at most `max_bytes` each, and at least one row."""
    num_rows, num_columns = matrix_shape(spec.shape)
    step = max(1, max_bytes // max(1, num_columns * spec.dtype.itemsize))
    yield from ((start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def row_blocks(source: TensorSource, name: str) -> Iterator[Tensor]:
    """All rows of a tensor, a chunk at a time."""
    for start, stop in row_ranges(source.specs[name]):
        yield source.read_rows(name, start, stop)


def total_bytes(specs: Mapping[str, TensorSpec]) -> int:
    return sum(spec.num_bytes for spec in specs.values())


def divide(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[dict[str, TensorSpec]]:
    """The tensors in order, divided into files of at most `max_bytes`; a larger tensor gets a file of its own."""
    files: list[dict[str, TensorSpec]] = [{}]
    free_bytes = max_bytes
    for name, spec in specs.items():
        if spec.num_bytes > free_bytes and files[-1]:
            files.append({})
            free_bytes = max_bytes
        files[-1][name] = spec
        free_bytes -= spec.num_bytes
    return files


def require_shapes(label: object, specs: Mapping[str, TensorSpec], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError with every tensor of `label` that is missing, unexpected or of another shape than `wanted`."""
    problems = [
        *(f"{name} {list(shape)} is missing" for name, shape in wanted.items() if name not in specs),
        *(f"{name} {list(specs[name].shape)} is not of this model" for name in sorted(set(specs) - set(wanted))),
        *(
            f"{name} is {list(specs[name].shape)}, expected {list(shape)}"
            for name, shape in wanted.items()
            if name in specs and specs[name].shape != shape
        ),
    ]
    if problems:
        raise CheckpointError(
            f"{label} does not hold the weights of this model:\n" + "\n".join(f"  - {p}" for p in problems)
            + "\nUse the config.json that belongs to these weights."
        )  # fmt: skip


def dtype_counts(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Number of tensors by type, as safetensors names them."""
    counts: dict[str, int] = {}
    for spec in specs.values():
        name = DTYPE_NAMES[spec.dtype]
        counts[name] = counts.get(name, 0) + 1
    return counts
