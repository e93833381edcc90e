"""The ViT against PaddleOCR-VL's, which is the same network written by others, and its parts against torch."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.paddleocr_vl.configuration_paddleocr_vl import PaddleOCRVisionConfig
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRVisionTransformer
from transformers.vision_utils import get_vision_cu_seqlens

from megatron_keye.contract.media import PATCH_VALUES, PatchGrid
from megatron_keye.errors import SettingsError
from megatron_keye.model.packed_segments import PackedSegments
from megatron_keye.model.vision import VisionTransformer, interpolate_table, rotary_embedding, rotate, vision_problems
from megatron_keye.model.vision_attention import attention_kernel, sdpa_attention

IMAGES = [PatchGrid(1, 6, 10), PatchGrid(1, 2, 2), PatchGrid(1, 30, 4), PatchGrid(1, 4, 30), PatchGrid(1, 28, 28)]
VIDEOS = [PatchGrid(3, 4, 6), PatchGrid(1, 8, 8), PatchGrid(2, 10, 2), PatchGrid(4, 4, 6)]
CPU = torch.device("cpu")


def random_pixels(grids: list[PatchGrid], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(sum(g.num_patches for g in grids), PATCH_VALUES, generator=generator) * 2 - 1).to(dtype)


def frames_of(grids: list[PatchGrid]) -> list[PatchGrid]:
    return [PatchGrid(1, g.h, g.w) for g in grids for _ in range(g.t)]


@pytest.fixture
def build(vision_model_config, randomize):
    def make(dtype=torch.float32, **vision) -> VisionTransformer:
        return randomize(VisionTransformer(vision_model_config(**vision).vision, dtype=dtype, attention="sdpa"))

    return make


@pytest.fixture
def oracle(build):
    """PaddleOCR-VL's ViT with the weights of ours."""
    ours = build()
    settings = PaddleOCRVisionConfig(hidden_size=144, intermediate_size=200, num_hidden_layers=3, num_attention_heads=2)
    settings._attn_implementation = "eager"
    theirs = PaddleOCRVisionTransformer(settings).eval()
    missing, unused = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith(("head.", "embeddings.packing_position_embedding.")) for name in unused)
    return theirs


def run_oracle(oracle, pixels: torch.Tensor, grids: list[PatchGrid], *, whole_clips: bool) -> torch.Tensor:
    sizes = torch.tensor([(g.t, g.h, g.w) for g in grids])
    bounds = get_vision_cu_seqlens(sizes, merge_temporal=whole_clips)
    return oracle(pixels.view(1, -1, 3, 14, 14), grid_thw=sizes, cu_seqlens=bounds).last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "grids", "whole_clips"),
    [
        ("vit_images", IMAGES, False),
        ("vit_video_per_frame", VIDEOS, False),
        ("vit_video_whole_clip", VIDEOS, True),
        ("vit_mixed_per_frame", IMAGES + VIDEOS, False),
        ("vit_mixed_whole_clip", VIDEOS + IMAGES, True),
    ],
)
def test_matches_paddleocr_vl(build, oracle, parity, name, grids, whole_clips):
    pixels = random_pixels(grids)
    ours = build()(pixels, grids if whole_clips else frames_of(grids))
    parity(name, ours, run_oracle(oracle, pixels, grids, whole_clips=whole_clips))


def test_gradients_match_paddleocr_vl(build, oracle, parity):
    ours, pixels = build(), random_pixels(VIDEOS)
    weights = torch.randn(pixels.shape[0], 144, generator=torch.Generator().manual_seed(2))
    (ours(pixels, VIDEOS) * weights).sum().backward()
    (run_oracle(oracle, pixels, VIDEOS, whole_clips=True) * weights).sum().backward()
    theirs = dict(oracle.named_parameters())
    for name, parameter in ours.named_parameters():
        # A bias on k moves no softmax, so its gradient is rounding noise in both.
        if parameter.requires_grad and not name.endswith("k_proj.bias"):
            parity(f"vit_gradient {name}", parameter.grad, theirs[name].grad, 3e-5)


@pytest.mark.parametrize(("h", "w"), [(2, 2), (10, 16), (54, 54), (4, 90), (27, 27), (200, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_table_is_resampled_as_torch_does(parity, h, w, dtype):
    table = torch.randn(27, 27, 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = F.interpolate(table.permute(2, 0, 1)[None], size=(h, w), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    parity(f"table_{h}x{w}", interpolate_table(table, h, w), expected.flatten(0, 1), 1e-12 if dtype == torch.float64 else 1e-5)


def test_rotary_products_depend_on_offsets_only():
    """Rotated q . k is a function of the row and column distance: moving both patches alike changes nothing."""
    rotary = rotary_embedding([PatchGrid(2, 6, 8)], 12, 100.0, dtype=torch.float64, device=CPU)
    q, k = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    turned_q, turned_k = (rotate(x.expand(96, 1, 12), rotary).view(2, 6, 8, 12) for x in (q, k))

    def product(from_row, from_column, to_row, to_column):
        return turned_q[0, from_row, from_column] @ turned_k[1, to_row, to_column]

    torch.testing.assert_close(product(0, 1, 2, 4), product(3, 4, 5, 7))
    assert not torch.isclose(product(0, 1, 2, 4), product(0, 1, 4, 2))
    torch.testing.assert_close(turned_q[0], turned_q[1], rtol=0, atol=0)


def test_packed_equals_separate(build):
    model, grids = build(torch.float64), IMAGES + VIDEOS
    pixels = random_pixels(grids, torch.float64)
    separate = [model(piece, [grid]) for piece, grid in zip(pixels.split([g.num_patches for g in grids]), grids, strict=True)]
    torch.testing.assert_close(model(pixels, grids), torch.cat(separate), rtol=0, atol=1e-12)


def test_a_segment_does_not_see_its_neighbours(build):
    model, grids = build(), [PatchGrid(1, 4, 4), PatchGrid(2, 4, 4)]
    pixels = random_pixels(grids).requires_grad_()
    model(pixels, grids)[16:].sum().backward()
    assert pixels.grad[:16].eq(0).all() and pixels.grad[16:].ne(0).any()


def test_recompute_gives_the_same_gradients(build):
    gradients = []
    for recompute in (False, True):
        model = build(recompute=recompute)
        model(random_pixels(VIDEOS), VIDEOS).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=0, atol=0)


def test_recompute_runs_layers_twice(build):
    model, calls = build(recompute=True), []
    model.encoder.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model(random_pixels(VIDEOS), VIDEOS).sum().backward()
    assert len(calls) == 2


def test_grids_must_describe_the_patches(build):
    with pytest.raises(ValueError, match=r"patches are \[16, 588\]; the grids describe \[24, 588\]"):
        build()(random_pixels([PatchGrid(1, 4, 4)]), [PatchGrid(1, 4, 6)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(hidden_size=36, num_heads=2), "head dimension is 18 .* multiple of 4"),
        (dict(hidden_size=145), "145 is not divisible by vision.num_heads 2"),
        (dict(patch_size=16), "patch_size is 16"),
    ],
)
def test_impossible_settings_are_named(vision_model_config, settings, message):
    vision = vision_model_config(**settings).vision
    assert len(vision_problems(vision)) == 1
    with pytest.raises(SettingsError, match=message):
        VisionTransformer(vision, dtype=torch.float32, attention="sdpa")


@pytest.mark.parametrize("lengths", [[4, 4, 4], [8, 4, 4, 12, 4], [16]])
def test_sdpa_equals_masked_attention(lengths):
    """Batched calls per run against one call over everything with a block-diagonal mask."""
    q, k, v = torch.randn(3, sum(lengths), 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    segments = PackedSegments.of([PatchGrid(1, 2, length // 2) for length in lengths], CPU)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = owner[:, None] == owner[None]
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)
    torch.testing.assert_close(sdpa_attention(q, k, v, segments), expected)
    assert segments.cu_seqlens.dtype == torch.int32 and segments.cu_seqlens.diff().tolist() == lengths
    assert segments.max_patches == max(lengths)


def test_kernel_choice():
    half = dict(head_dim=72, dtype=torch.bfloat16)
    assert attention_kernel("auto", device=CPU, **half) is sdpa_attention
    for name in ("varlen", "flash"):
        with pytest.raises(SettingsError, match=f"{name}, but the model is on cpu, not on cuda"):
            attention_kernel(name, device=CPU, **half)
    with pytest.raises(SettingsError, match="float64, not bfloat16.*head dimension 12 is not a multiple of 8"):
        attention_kernel("varlen", head_dim=12, dtype=torch.float64, device=torch.device("cuda"))
    with pytest.raises(SettingsError, match="'fast'; expected"):
        attention_kernel("fast", device=CPU, **half)
