"""The encoder as the trainer uses it: uint8 patches in, decoder rows out, any number of segments, any dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PaddleOCRVLConfig
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRProjector, PaddleOCRVisionModel
from transformers.vision_utils import get_vision_cu_seqlens

from megatron_keye.config.schema import DecoderConfig, ModelConfig, VisionConfig
from megatron_keye.contract.media import PatchGrid
from megatron_keye.errors import SettingsError
from megatron_keye.model.encoder import VisualEncoder, batching_order, inverse_permutation, normalise, permute_segments
from megatron_keye.model.init import fill
from megatron_keye.model.names import encoder_pieces, local_parameters

GRIDS = [PatchGrid(1, 6, 10), PatchGrid(3, 4, 6), PatchGrid(1, 4, 6), PatchGrid(1, 10, 6), PatchGrid(1, 4, 6), PatchGrid(1, 2, 2)]
VARIANTS = ["keye_vl_preview", "keye_vl_1_5"]


def random_patches(grids: list[PatchGrid]) -> torch.Tensor:
    shape = (sum(g.num_patches for g in grids), 588)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def build(vision_model_config, randomize):
    def make(variant="keye_vl_1_5", dtype=torch.float32, **vision) -> VisualEncoder:
        return randomize(VisualEncoder(vision_model_config(variant, **vision), dtype=dtype, attention="auto"))

    return make


@torch.no_grad()
@pytest.mark.parametrize("whole_clips", [True, False])
def test_preview_matches_paddleocr_vl_end_to_end(build, parity, whole_clips):
    """uint8 pixels to decoder rows, with the released tensor names read by the other implementation."""
    ours, patches = build("keye_vl_preview"), random_patches(GRIDS)
    vision_sizes = dict(hidden_size=144, intermediate_size=200, num_hidden_layers=3, num_attention_heads=2)
    config = PaddleOCRVLConfig(vision_config=vision_sizes, text_config=dict(hidden_size=40))
    vit, projector = PaddleOCRVisionModel(config.vision_config).eval(), PaddleOCRProjector(config)
    state = ours.state_dict()
    missing, _ = vit.load_state_dict({name.removeprefix("visual."): value for name, value in state.items()}, strict=False)
    assert not missing
    projector.load_state_dict({name.removeprefix("mlp_AR."): state[name] for name in state if name.startswith("mlp_AR.")})

    pixels = ((patches.view(1, -1, 3, 14, 14) / 255) - 0.5) / 0.5
    sizes = torch.tensor([(g.t, g.h, g.w) for g in GRIDS])
    bounds = get_vision_cu_seqlens(sizes, merge_temporal=whole_clips)
    expected = projector(vit(pixels, grid_thw=sizes, cu_seqlens=bounds).last_hidden_state, sizes)
    segments = GRIDS if whole_clips else [PatchGrid(1, g.h, g.w) for g in GRIDS for _ in range(g.t)]
    parity(f"encoder_preview_{'whole_clip' if whole_clips else 'per_frame'}", ours(patches, segments), expected)


def released_8b(variant: str) -> ModelConfig:
    vision = VisionConfig(hidden_size=1152, num_layers=27, num_heads=16, ffn_hidden_size=4304)
    decoder = DecoderConfig(
        num_layers=36, hidden_size=4096, num_heads=32, num_kv_groups=8, head_dim=128, ffn_hidden_size=12288, vocab_size=151936
    )
    return ModelConfig(variant=variant, vision=vision, decoder=decoder)


def released_shapes(norm_size: int) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of the released 8B checkpoints, vision side."""
    size, ffn, root = 1152, 4304, "visual.vision_model"
    shapes = {
        f"{root}.embeddings.patch_embedding.weight": (size, 3, 14, 14),
        f"{root}.embeddings.patch_embedding.bias": (size,),
        f"{root}.embeddings.position_embedding.weight": (729, size),
        f"{root}.embeddings.packing_position_embedding.weight": (32768, size),
        f"{root}.head.probe": (1, 1, size),
        f"{root}.head.attention.in_proj_weight": (3 * size, size),
        f"{root}.head.attention.in_proj_bias": (3 * size,),
    }
    linears = {f"{root}.head.attention.out_proj": (size, size), "mlp_AR.linear_1": (4608, 4608), "mlp_AR.linear_2": (4096, 4608)}
    norms = {f"{root}.post_layernorm": size, f"{root}.head.layernorm": size, "mlp_AR.pre_norm": norm_size}
    layers = [f"{root}.encoder.layers.{i}" for i in range(27)]
    for block in [*layers, f"{root}.head"]:
        linears |= {f"{block}.mlp.fc1": (ffn, size), f"{block}.mlp.fc2": (size, ffn)}
    for layer in layers:
        linears |= {f"{layer}.self_attn.{name}_proj": (size, size) for name in ("q", "k", "v", "out")}
        norms |= {f"{layer}.layer_norm1": size, f"{layer}.layer_norm2": size}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


@pytest.mark.parametrize(("variant", "norm_size"), [("keye_vl_preview", 1152), ("keye_vl_1_5", 4608)])
def test_names_and_shapes_are_the_released_ones(variant, norm_size):
    with torch.device("meta"):
        encoder = VisualEncoder(released_8b(variant), dtype=torch.bfloat16, attention="auto")
    assert {name: tuple(value.shape) for name, value in encoder.state_dict().items()} == released_shapes(norm_size)
    assert all(parameter.dtype == torch.bfloat16 for parameter in encoder.parameters())
    assert sum(p.numel() for p in encoder.visual.parameters()) == 465_974_336
    assert sum(p.numel() for p in encoder.visual.parameters() if p.requires_grad) == 412_987_248
    assert sum(p.numel() for p in encoder.mlp_AR.parameters()) == 40_119_040 + 2 * (norm_size - 1152)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_separate(build, variant):
    encoder, patches = build(variant, torch.float64), random_patches(GRIDS)
    separate = [encoder(piece, [grid]) for piece, grid in zip(patches.split([g.num_patches for g in GRIDS]), GRIDS, strict=True)]
    packed = encoder(patches, GRIDS)
    assert packed.shape == (sum(g.num_tokens for g in GRIDS), 40)
    torch.testing.assert_close(packed, torch.cat(separate), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_to_encode(build, variant, recompute):
    encoder = build(variant, recompute=recompute)
    rows = encoder(torch.empty(0, 588, dtype=torch.uint8), [])
    assert rows.shape == (0, 40) and rows.dtype == torch.float32
    rows.backward(torch.empty(0, 40))
    trained = [p for p in encoder.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.eq(0).all() for p in trained)


@pytest.mark.parametrize("recompute", [False, True])
def test_every_trained_weight_has_a_gradient_and_carried_ones_none(build, recompute):
    encoder = build(recompute=recompute)
    encoder(random_patches(GRIDS), GRIDS).square().sum().backward()
    with_gradient = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    carried = {name for name in encoder.state_dict() if ".head." in name or ".packing_position_embedding." in name}
    assert len(carried) == 12
    assert with_gradient == set(encoder.state_dict()) - carried
    assert all(not p.requires_grad for name, p in encoder.named_parameters() if name in carried)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_dtypes_agree_with_float64(build, dtype, tolerance):
    patches = random_patches(GRIDS)
    exact, rounded = (build(dtype=d)(patches, GRIDS) for d in (torch.float64, dtype))
    assert exact.dtype == torch.float64 and rounded.dtype == dtype
    assert (exact - rounded).norm() / exact.norm() < tolerance


def test_float64_is_float64_throughout(build):
    """Central differences are good to 1e-7 only if no step on the way rounds to float32."""
    encoder, patches = build(dtype=torch.float64), random_patches(GRIDS)
    weight = encoder.visual["vision_model"].encoder.layers[0].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(encoder(patches, GRIDS).square().mean(), weight)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    values, step = [], 1e-5
    with torch.no_grad():
        for shift in (step, -2 * step):
            weight += shift * direction
            values.append(encoder(patches, GRIDS).square().mean())
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), (gradient * direction).sum(), rtol=1e-7, atol=0)


def test_pixels_are_normalised_as_released():
    values = torch.arange(256, dtype=torch.uint8)
    expected = (values.double() - 127.5) / 127.5
    torch.testing.assert_close(normalise(values, torch.float64), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(normalise(values, torch.float32), expected.float(), rtol=0, atol=2e-7)
    assert torch.equal(normalise(values, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize(
    ("patches", "grids", "message"),
    [
        (torch.zeros(16, 588, dtype=torch.uint8), [PatchGrid(1, 4, 6)], r"uint8 \[16, 588\]; the grids describe torch.uint8 \[24, 588\]"),
        (torch.zeros(16, 588), [PatchGrid(1, 4, 4)], "patches are torch.float32"),
        (torch.zeros(12, 588, dtype=torch.uint8), [PatchGrid(1, 4, 3)], "multiples of 2"),
        (torch.zeros(0, 588, dtype=torch.uint8), [PatchGrid(0, 4, 4)], "t >= 1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(build, patches, grids, message):
    with pytest.raises(ValueError, match=message):
        build()(patches, grids)


def test_bad_head_dimension_is_a_settings_error(build):
    with pytest.raises(SettingsError, match="multiple of 4"):
        build(hidden_size=36)


SIDES = st.integers(1, 3).map(lambda n: 2 * n)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.builds(PatchGrid, t=st.integers(1, 3), h=SIDES, w=SIDES), min_size=1, max_size=12))
def test_segments_are_brought_together_and_back(grids):
    order = batching_order(grids)
    lengths = [grids[i].num_patches for i in order]
    assert lengths == sorted(lengths)
    sizes = [g.num_patches for g in grids]
    x = torch.arange(sum(sizes))
    there = permute_segments(x, sizes, order)
    assert torch.equal(permute_segments(there, lengths, inverse_permutation(order)), x)


def test_fresh_weights_follow_from_the_seed_alone(vision_model_config):
    def fresh(seed, dtype=torch.float32):
        encoder = VisualEncoder(vision_model_config(), dtype=dtype, attention="sdpa")
        fill(encoder_pieces(local_parameters(encoder)), 0.02, seed)
        return encoder.state_dict()

    first, again, other, half = fresh(0), fresh(0), fresh(1), fresh(0, torch.bfloat16)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value.bfloat16(), half[name])
        if name.endswith("bias"):
            assert value.eq(0).all()
        elif "norm" in name:
            assert value.eq(1).all()
        else:
            assert not torch.equal(value, other[name])
            assert value.std().item() == pytest.approx(0.02, rel=0.2)
