"""The visual encoder: uint8 patches of many attention segments to rows of decoder input."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_keye.config.schema import ModelConfig
from megatron_keye.contract.media import MERGE, PATCH_VALUES, PatchGrid
from megatron_keye.model.projector import PROJECTORS
from megatron_keye.model.vision import VisionTransformer

NO_FRAMES = PatchGrid(t=0, h=MERGE, w=MERGE)
"""A segment without frames: it lets a rank that has nothing to encode run the same code, so every weight gets its (zero) gradient."""


class VisualEncoder(nn.Module):
    """ViT and projector. Its state dict has the names and shapes of the released checkpoints (`visual.*` and `mlp_AR.*`).

    Weights are uninitialised until `model/init.py` or a checkpoint fills them. The tensors that the model carries for
    compatibility but never uses (the pooling head and the packing positions) are frozen parameters.
    Raises SettingsError where the vision settings cannot be built.
    """

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype, attention: str):
        super().__init__()
        self.dtype = dtype
        vision_model = VisionTransformer(model.vision, dtype=dtype, attention=attention)
        self.visual = nn.ModuleDict({"vision_model": vision_model})
        self.mlp_AR = PROJECTORS[model.variant](model, dtype=dtype)

    def forward(self, patches: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """Encode segments, one grid each. A video is one segment per clip or per frame, as the caller's grids say.

        patches: uint8 [num_patches, 588], the segments one after another, frames in time order, patches rows first, values in
        (channel, row, column) order. Returns [sum of num_tokens, decoder hidden size] in the same order; none for no grids.
        Raises ValueError where patches and grids do not fit.
        """
        check_inputs(patches, grids)
        grids = tuple(grids) or (NO_FRAMES,)
        order = batching_order(grids)
        ordered = [grids[i] for i in order]
        pixels = normalise(permute_segments(patches, [grid.num_patches for grid in grids], order), self.dtype)
        rows = self.mlp_AR(self.visual["vision_model"](pixels, ordered), ordered)
        return permute_segments(rows, [grid.num_tokens for grid in ordered], inverse_permutation(order))


def check_inputs(patches: Tensor, grids: Sequence[PatchGrid]) -> None:
    """Raises ValueError unless `patches` are uint8 [num_patches of `grids`, 588] and every grid has whole 2x2 squares."""
    for grid in grids:
        if min(grid.t, grid.h, grid.w) < 1 or grid.h % MERGE or grid.w % MERGE:
            raise ValueError(f"{grid} cannot be encoded: it needs t >= 1 and h, w that are positive multiples of {MERGE}")
    expected = (sum(grid.num_patches for grid in grids), PATCH_VALUES)
    if patches.dtype != torch.uint8 or patches.shape != expected:
        raise ValueError(f"patches are {patches.dtype} {list(patches.shape)}; the grids describe torch.uint8 {list(expected)}")


def batching_order(grids: Sequence[PatchGrid]) -> list[int]:
    """Segments in an order that brings those of equal length, and among them those of equal size, together."""
    return sorted(range(len(grids)), key=lambda i: (grids[i].num_patches, grids[i].h, grids[i].w))


def inverse_permutation(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=lambda i: order[i])


def permute_segments(x: Tensor, sizes: list[int], order: Sequence[int]) -> Tensor:
    """x holds segments of `sizes` rows one after another; segment order[0] comes first in the result."""
    pieces = x.split(sizes)
    return torch.cat([pieces[i] for i in order])


def normalise(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """(x / 255 - 0.5) / 0.5, computed in at least float32 and rounded to `dtype` once, as the released preprocessing does."""
    wide = torch.promote_types(dtype, torch.float32)
    return ((patches.to(wide) / 255 - 0.5) / 0.5).to(dtype)
