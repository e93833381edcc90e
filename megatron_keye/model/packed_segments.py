"""Where attention segments lie in a packed sequence of patches."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from megatron_keye.contract.media import PatchGrid


@dataclass(frozen=True, slots=True)
class PackedSegments:
    """Where segments lie in a packed sequence, in the two forms that kernels want.

    `runs` are (number of segments, patches in each) of neighbours of equal length; `cu_seqlens` [num_segments + 1], int32, are
    the boundaries on the device of the patches.
    """

    runs: tuple[tuple[int, int], ...]
    cu_seqlens: Tensor
    max_patches: int

    @classmethod
    def of(cls, grids: Sequence[PatchGrid], device: torch.device) -> "PackedSegments":
        lengths = [grid.num_patches for grid in grids]
        runs = tuple((len(list(run)), length) for length, run in groupby(lengths))
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return cls(runs, ends.to(device, torch.int32), max(lengths, default=0))
