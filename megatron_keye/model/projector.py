"""The projector: every 2x2 square of patch features becomes one decoder position.

The variants differ only in where the norm stands. Keye-VL-8B-Preview normalises each patch before the merge, Keye-VL-1.5 each merged token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_keye.config.schema import ModelConfig, Variant
from megatron_keye.contract.media import MERGE, PatchGrid
from megatron_keye.model.vision import frame_runs

PATCHES_PER_TOKEN = MERGE * MERGE


def merge_squares(features: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
    """Patch features [num_patches, D] -> [num_tokens, 4 * D]: top left, top right, bottom left, bottom right."""
    runs = frame_runs(grids)
    pieces = features.split([frames * h * w for frames, h, w in runs])
    merged = []
    for piece, (frames, h, w) in zip(pieces, runs, strict=True):
        # An even h keeps every pair of rows inside one frame, so frames need no axis of their own.
        squares = piece.unflatten(0, (frames * h // MERGE, MERGE, w // MERGE, MERGE)).transpose(1, 2)
        merged.append(squares.flatten(2).flatten(0, 1))
    return torch.cat(merged)


class Projector(nn.Module):
    """What the variants share: two linear maps around the exact GELU, after `merge` normalised and merged the features."""

    def __init__(self, model: ModelConfig, *, norm_size: int, dtype: torch.dtype):
        super().__init__()
        merged_size = model.vision.hidden_size * PATCHES_PER_TOKEN
        self.pre_norm = nn.LayerNorm(norm_size, model.projector.norm_eps, dtype=dtype)
        self.linear_1 = nn.Linear(merged_size, merged_size, dtype=dtype)
        self.linear_2 = nn.Linear(merged_size, model.decoder.hidden_size, dtype=dtype)

    def merge(self, features: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """Features [num_patches, D] -> normalised tokens [num_tokens, 4 * D]."""
        raise NotImplementedError

    def forward(self, features: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """Features [num_patches, D] of grids of even height and width -> [num_tokens, decoder hidden size], rows first."""
        return self.linear_2(F.gelu(self.linear_1(self.merge(features, grids))))


class PreviewProjector(Projector):
    """Keye-VL-8B-Preview: `pre_norm` is as wide as a patch."""

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype):
        super().__init__(model, norm_size=model.vision.hidden_size, dtype=dtype)

    def merge(self, features: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        return merge_squares(self.pre_norm(features), grids)


class MergedNormProjector(Projector):
    """Keye-VL-1.5: `pre_norm` is as wide as a merged token."""

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype):
        super().__init__(model, norm_size=model.vision.hidden_size * PATCHES_PER_TOKEN, dtype=dtype)

    def merge(self, features: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        return self.pre_norm(merge_squares(features, grids))


PROJECTORS: dict[Variant, type[PreviewProjector | MergedNormProjector]] = {
    "keye_vl_preview": PreviewProjector,
    "keye_vl_1_5": MergedNormProjector,
}
