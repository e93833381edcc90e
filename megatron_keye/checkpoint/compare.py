"""Two sources of tensors, compared name by name and block by block."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_keye.checkpoint.files import DTYPE_NAMES, OnBytes, TensorSpec
from megatron_keye.checkpoint.tensors import TensorSource, row_ranges

BLOCK_BYTES = 4 << 20
"""Differences are computed in float64, so a block becomes up to a few times as large."""


def differences(a: TensorSource, b: TensorSource, on_bytes: OnBytes = lambda num_bytes: None) -> Iterator[str]:
    """A sentence about every tensor that is in one source only, or differs in shape, type or any bit. Host memory used: a few blocks.

    `on_bytes` is told the bytes of `a` that have been compared.
    """
    specs_a, specs_b = a.specs, b.specs
    for name, spec in specs_a.items():
        other = specs_b.get(name)
        if other is None:
            yield f"{name} {_text(spec)} is only in the first"
        elif other.shape != spec.shape:
            yield f"{name} is {_text(spec)} in the first, {_text(other)} in the second"
        else:
            yield from _value_difference(name, a, b)
        on_bytes(spec.num_bytes)
    yield from (f"{name} {_text(spec)} is only in the second" for name, spec in specs_b.items() if name not in specs_a)


def _value_difference(name: str, a: TensorSource, b: TensorSource) -> Iterator[str]:
    spec, other = a.specs[name], b.specs[name]
    num_different, largest = 0, 0.0
    for start, stop in row_ranges(spec, BLOCK_BYTES):
        mine, theirs = a.read_rows(name, start, stop), b.read_rows(name, start, stop)
        if spec.dtype != other.dtype or not torch.equal(_bits(mine), _bits(theirs)):
            found, difference = _block_difference(mine, theirs)
            num_different += found
            largest = max(largest, difference)
    if spec.dtype != other.dtype:
        yield f"{name} is {_text(spec)} in the first, {_text(other)} in the second; largest difference {largest:.3e}"
    elif num_different:
        yield f"{name} {_text(spec)} differs in {num_different:,} elements; largest difference {largest:.3e}"


def _block_difference(mine: Tensor, theirs: Tensor) -> tuple[int, float]:
    """Elements that differ, in value or in bits, and the largest difference; a number against no number differs by infinity."""
    x, y = mine.double(), theirs.double()
    unequal = x != y if mine.dtype != theirs.dtype else _element_bits(mine) != _element_bits(theirs)
    gap = (x - y).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    gap = gap.masked_fill((x == y) | (x.isnan() & y.isnan()), 0.0)
    return int(unequal.sum()), float(gap.max())


def _bits(block: Tensor) -> Tensor:
    return block.contiguous().view(torch.uint8)


def _element_bits(block: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return block.contiguous().view(integers[block.element_size()])


def _text(spec: TensorSpec) -> str:
    return f"{DTYPE_NAMES[spec.dtype]} {list(spec.shape)}"
