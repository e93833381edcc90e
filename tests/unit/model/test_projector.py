"""The projectors against PaddleOCR-VL's (Keye-VL-8B-Preview) and Qwen3-VL's merger (Keye-VL-1.5)."""

import pytest
import torch
from transformers import PaddleOCRVLConfig
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRProjector
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from megatron_keye.contract.media import PatchGrid
from megatron_keye.model.projector import PROJECTORS, merge_squares

GRIDS = [PatchGrid(1, 6, 10), PatchGrid(3, 4, 6), PatchGrid(1, 4, 6), PatchGrid(2, 2, 12), PatchGrid(1, 2, 2)]


def random_features(grids: list[PatchGrid]) -> torch.Tensor:
    return torch.randn(sum(g.num_patches for g in grids), 144, generator=torch.Generator().manual_seed(1)) + 0.5


@pytest.fixture
def build(vision_model_config, randomize):
    def make(variant):
        return randomize(PROJECTORS[variant](vision_model_config(variant), dtype=torch.float32))

    return make


@torch.no_grad()
def test_preview_matches_paddleocr_vl(build, parity):
    ours = build("keye_vl_preview")
    oracle = PaddleOCRProjector(PaddleOCRVLConfig(vision_config=dict(hidden_size=144), text_config=dict(hidden_size=40)))
    oracle.load_state_dict(ours.state_dict())
    features = random_features(GRIDS)
    sizes = torch.tensor([(g.t, g.h, g.w) for g in GRIDS])
    parity("projector_preview", ours(features, GRIDS), oracle(features, sizes))


def merge_by_loops(features: torch.Tensor, grids: list[PatchGrid]) -> torch.Tensor:
    """The definition, square by square."""
    merged, start = [], 0
    for grid in grids:
        for frame in range(grid.t):
            at = start + frame * grid.h * grid.w
            for row in range(0, grid.h, 2):
                for column in range(0, grid.w, 2):
                    corners = [at + (row + dy) * grid.w + column + dx for dy in (0, 1) for dx in (0, 1)]
                    merged.append(torch.cat([features[corner] for corner in corners]))
        start += grid.num_patches
    return torch.stack(merged)


@torch.no_grad()
def test_1_5_matches_qwen3_vl(build, parity):
    ours = build("keye_vl_1_5")
    oracle = Qwen3VLVisionPatchMerger(Qwen3VLVisionConfig(hidden_size=144, out_hidden_size=40), use_postshuffle_norm=True)
    oracle.norm.eps = 1e-5
    names = {"pre_norm": "norm", "linear_1": "linear_fc1", "linear_2": "linear_fc2"}
    oracle.load_state_dict({f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in ours.state_dict().items()})
    # Small features, so that the epsilon of the norm is felt.
    features = random_features(GRIDS) * 1e-2
    parity("projector_1_5", ours(features, GRIDS), oracle(merge_by_loops(features, GRIDS)))


def test_squares_are_merged_rows_first():
    features = random_features(GRIDS)
    torch.testing.assert_close(merge_squares(features, GRIDS), merge_by_loops(features, GRIDS), rtol=0, atol=0)


@pytest.mark.parametrize(("variant", "norm_size"), [("keye_vl_preview", 144), ("keye_vl_1_5", 576)])
def test_norm_width_tells_the_variants_apart(build, variant, norm_size):
    assert build(variant).pre_norm.weight.shape == (norm_size,)
