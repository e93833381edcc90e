"""The native-resolution SigLIP vision transformer (ViT) of Keye-VL, over the packed patches of many images and frames.

Plain single-device PyTorch. Module names are those of the released checkpoints, so that a state dict needs no renaming.
Shapes: N patches in all, D hidden size, heads x K = D.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_keye.config.schema import VisionConfig
from megatron_keye.contract.media import PATCH_PIXELS, PATCH_VALUES, PatchGrid
from megatron_keye.errors import SettingsError
from megatron_keye.model.packed_segments import PackedSegments
from megatron_keye.model.vision_attention import attention_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention within segments: q, k, v [N, heads, K] -> [N, heads, K]."""


class Rotary(NamedTuple):
    """Cosine and sine of the rotary angles, each [N, 1, K / 2], in float32 or wider."""

    cos: Tensor
    sin: Tensor


def vision_problems(vision: VisionConfig) -> list[str]:
    """What makes these settings impossible to build; empty where nothing does."""
    problems = []
    head_dim, rest = divmod(vision.hidden_size, vision.num_heads)
    if rest:
        problems.append(f"vision.hidden_size {vision.hidden_size} is not divisible by vision.num_heads {vision.num_heads}")
    elif head_dim % 4:
        problems.append(
            f"the ViT's head dimension is {head_dim} (hidden_size {vision.hidden_size} / num_heads {vision.num_heads}); "
            "its 2D rotary embedding needs a multiple of 4: change vision.hidden_size or vision.num_heads"
        )
    if vision.patch_size != PATCH_PIXELS:
        problems.append(f"vision.patch_size is {vision.patch_size}; patches are cut {PATCH_PIXELS} pixels wide, so set {PATCH_PIXELS}")
    return problems


def frame_runs(grids: Sequence[PatchGrid]) -> list[tuple[int, int, int]]:
    """Neighbouring frames of one size as (frames, h, w): what depends on the size alone is computed once a run."""
    return [(sum(grid.t for grid in run), h, w) for (h, w), run in groupby(grids, key=lambda grid: (grid.h, grid.w))]


def interpolation_matrix(size: int, table_size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size, table_size] weights of 1D linear interpolation with half-pixel centres, clamped at the borders.

    The rule of `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` along one axis.
    """
    centre = (torch.arange(size, dtype=dtype, device=device) + 0.5) * (table_size / size) - 0.5
    centre = centre.clamp(0, table_size - 1)
    distance = (centre[:, None] - torch.arange(table_size, dtype=dtype, device=device)).abs()
    return (1 - distance).clamp(min=0)


def interpolate_table(table: Tensor, h: int, w: int) -> Tensor:
    """The learned position table [side, side, D] bilinearly resampled to [h * w, D], rows first, in float32 or wider.

    Two matrix products rather than a gather, because their backward pass adds in a fixed order on every device.
    """
    dtype = torch.promote_types(table.dtype, torch.float32)
    to_rows, to_columns = (interpolation_matrix(size, table.shape[0], dtype=dtype, device=table.device) for size in (h, w))
    return torch.einsum("hi,ijd,wj->hwd", to_rows, table.to(dtype), to_columns).flatten(0, 1)


def rotary_embedding(grids: Sequence[PatchGrid], head_dim: int, base: float, *, dtype: torch.dtype, device: torch.device) -> Rotary:
    """2D rotary embedding: the first half of the angles follows a patch's row, the second its column; frames repeat them.

    Each axis has head_dim / 4 frequencies base ** (-2i / (head_dim / 2)).
    """
    axis_dim = head_dim // 2
    frequencies = 1.0 / base ** (torch.arange(0, axis_dim, 2, dtype=dtype, device=device) / axis_dim)
    runs = []
    for frames, h, w in frame_runs(grids):
        rows, columns = (torch.outer(torch.arange(size, dtype=dtype, device=device), frequencies) for size in (h, w))
        angles = torch.cat((rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)), dim=-1)
        runs.append(angles.flatten(0, 1).repeat(frames, 1))
    angles = torch.cat(runs)[:, None]
    return Rotary(angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """x [N, heads, K] turned by its angles, pairing i with i + K / 2, computed in the dtype of the angles."""
    first, second = x.to(rotary.cos.dtype).chunk(2, dim=-1)
    turned = torch.cat((first * rotary.cos - second * rotary.sin, second * rotary.cos + first * rotary.sin), dim=-1)
    return turned.to(x.dtype)


class PatchEmbedding(nn.Module):
    """A linear map of patches, whose weight keeps the shape of the convolution it was released as."""

    def __init__(self, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, 3, PATCH_PIXELS, PATCH_PIXELS, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, dtype=dtype))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [N, 588] in (channel, row, column) order -> [N, D]."""
        return F.linear(pixels, self.weight.flatten(1), self.bias)


def _empty_table(num_rows: int, width: int, dtype: torch.dtype) -> nn.Embedding:
    """Not initialised: to draw a table on the meta device, torch imports its compiler, which takes seconds."""
    return nn.Embedding.from_pretrained(torch.empty(num_rows, width, dtype=dtype), freeze=False)


class VisionEmbeddings(nn.Module):
    """Patch embeddings plus learned positions. `packing_position_embedding` is only carried for the checkpoint."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype):
        super().__init__()
        self.table_side = vision.position_table_side
        self.patch_embedding = PatchEmbedding(vision.hidden_size, dtype)
        self.position_embedding = _empty_table(self.table_side**2, vision.hidden_size, dtype)
        self.packing_position_embedding = _empty_table(vision.carried_position_rows, vision.hidden_size, dtype)
        self.packing_position_embedding.requires_grad_(False)

    def forward(self, pixels: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """pixels [N, 588] -> [N, D]."""
        table = self.position_embedding.weight.unflatten(0, (self.table_side, self.table_side))
        positions = [interpolate_table(table, h, w).to(table.dtype).repeat(frames, 1) for frames, h, w in frame_runs(grids)]
        return self.patch_embedding(pixels) + torch.cat(positions)


class SegmentAttention(nn.Module):
    """Multi-head attention of the patches of one segment among themselves."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype):
        super().__init__()
        size = vision.hidden_size
        self.num_heads = vision.num_heads
        self.q_proj = nn.Linear(size, size, dtype=dtype)
        self.k_proj = nn.Linear(size, size, dtype=dtype)
        self.v_proj = nn.Linear(size, size, dtype=dtype)
        self.out_proj = nn.Linear(size, size, dtype=dtype)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """x [N, D] -> [N, D]."""
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(rotate(q, rotary), rotate(k, rotary), v).flatten(1))


class FeedForward(nn.Module):
    """Two linear maps around the tanh approximation of GELU."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype):
        super().__init__()
        self.fc1 = nn.Linear(vision.hidden_size, vision.ffn_hidden_size, dtype=dtype)
        self.fc2 = nn.Linear(vision.ffn_hidden_size, vision.hidden_size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(vision.hidden_size, vision.norm_eps, dtype=dtype)
        self.self_attn = SegmentAttention(vision, dtype)
        self.layer_norm2 = nn.LayerNorm(vision.hidden_size, vision.norm_eps, dtype=dtype)
        self.mlp = FeedForward(vision, dtype)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), rotary, attend)
        return x + self.mlp(self.layer_norm2(x))


class VisionLayers(nn.Module):
    """The stack of blocks, each recomputed in the backward pass where the settings ask for it."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype):
        super().__init__()
        self.recompute = vision.recompute
        self.layers = nn.ModuleList(VisionLayer(vision, dtype) for _ in range(vision.num_layers))

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, rotary, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rotary, attend)
        return x


class CarriedHead(nn.Module):
    """The attention pooling head of SigLIP, which Keye-VL never runs: it exists so that checkpoints keep its tensors."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, vision.hidden_size, dtype=dtype))
        self.attention = nn.MultiheadAttention(vision.hidden_size, vision.num_heads, dtype=dtype)
        self.layernorm = nn.LayerNorm(vision.hidden_size, vision.norm_eps, dtype=dtype)
        self.mlp = FeedForward(vision, dtype)
        self.requires_grad_(False)


class VisionTransformer(nn.Module):
    """Packed patches to features. Patches attend within their segment; positions restart with every frame.

    Raises SettingsError where the settings cannot be built.
    """

    def __init__(self, vision: VisionConfig, *, dtype: torch.dtype, attention: str):
        super().__init__()
        if problems := vision_problems(vision):
            raise SettingsError(problems)
        self.head_dim = vision.hidden_size // vision.num_heads
        self.rope_base = vision.rope_base
        self.attention = attention
        self.embeddings = VisionEmbeddings(vision, dtype)
        self.encoder = VisionLayers(vision, dtype)
        self.post_layernorm = nn.LayerNorm(vision.hidden_size, vision.norm_eps, dtype=dtype)
        self.head = CarriedHead(vision, dtype)

    def forward(self, pixels: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """pixels [N, 588], normalised, in the module's dtype; at least one grid, of attention segments -> features [N, D].

        Segments of equal length that are neighbours share a kernel call, so sort them where speed matters.
        """
        num_patches = sum(grid.num_patches for grid in grids)
        if pixels.shape != (num_patches, PATCH_VALUES):
            raise ValueError(f"patches are {list(pixels.shape)}; the grids describe {[num_patches, PATCH_VALUES]}")
        x = self.embeddings(pixels, grids)
        wide = torch.promote_types(x.dtype, torch.float32)
        rotary = rotary_embedding(grids, self.head_dim, self.rope_base, dtype=wide, device=x.device)
        kernel = attention_kernel(self.attention, head_dim=self.head_dim, dtype=x.dtype, device=x.device)
        attend = partial(kernel, segments=PackedSegments.of(grids, x.device))
        return self.post_layernorm(self.encoder(x, rotary, attend))
