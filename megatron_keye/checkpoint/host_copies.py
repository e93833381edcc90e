"""Copies of a rank's state in host memory, made in one block that is kept from one save to the next.

New memory costs more than copying into it: each page is cleared first. A block that stays can also be registered with the GPU
("pinned"), which lets copies run at the speed of the bus.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from megatron_keye.checkpoint.state import SavedPart
from megatron_keye.errors import CheckpointError

ALIGNMENT_BYTES = 64


class HostCopies:
    """Of one state, whose parts keep their sizes. Host memory: one copy, from the first call of `make` on."""

    def __init__(self) -> None:
        self._block: Tensor | None = None

    def make(self, parts: Iterable[SavedPart]) -> list[SavedPart]:
        """`parts` with copies of their data, which stay as they are until the next call.

        Raises CheckpointError where memory cannot be registered with the GPU.
        """
        parts = list(parts)
        ends = list(accumulate((_aligned(part.data.nbytes) for part in parts), initial=0))
        is_on_gpu = any(part.data.is_cuda for part in parts)
        if self._block is None:
            self._block = _new_block(ends[-1], is_on_gpu)
        copies = []
        for part, start in zip(parts, ends, strict=False):
            place = self._block[start : start + part.data.nbytes].view(part.data.dtype).view(part.data.shape)
            copies.append(replace(part, data=place.copy_(part.data, non_blocking=True)))
        if is_on_gpu:
            torch.cuda.synchronize()
        return copies


def _new_block(num_bytes: int, is_for_gpu: bool) -> Tensor:
    block = torch.empty(num_bytes, dtype=torch.uint8)
    if is_for_gpu:
        # Not by `pin_memory`, which would take the next power of two.
        status = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), num_bytes, 0)
        if int(status) != 0:
            raise CheckpointError(f"{num_bytes / 1e9:,.1f} GB of host memory cannot be pinned ({status}); set train.async_save=false")
    return block


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
