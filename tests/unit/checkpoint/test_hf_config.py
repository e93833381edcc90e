"""config.json as released, and what is refused."""

import json

import pytest

from megatron_keye.checkpoint.hf_config import make_hf_config, read_hf_config, read_max_positions
from megatron_keye.config.load import load_config
from megatron_keye.errors import CheckpointError
from tests.unit.checkpoint.hf_folder import MAX_POSITIONS, small_model, write_hf_folder

VARIANTS = ("keye_vl_preview", "keye_vl_1_5")
PREVIEW_8B = {
    "architectures": ["KeyeForConditionalGeneration"], "model_type": "Keye", "hidden_size": 4096, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "vocab_size": 151936, "tie_word_embeddings": False, "attention_bias": False, "rope_theta": 1000000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "max_position_embeddings": 40960,
    "use_sliding_window": False, "max_window_layers": 36, "initializer_range": 0.02, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656,
}  # fmt: skip
"""Values published for Keye-VL-8B-Preview."""
PREVIEW_8B_VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16,
    "intermediate_size": 4304, "patch_size": 14, "image_size": 384, "num_channels": 3, "spatial_merge_size": 2,
    "tokens_per_second": 2, "temporal_patch_size": 2,
}  # fmt: skip
RELEASED_IDS = {
    "<|endoftext|>": 151643, "<|im_end|>": 151645, "<|vision_start|>": 151652, "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654, "<|image_pad|>": 151655, "<|video_pad|>": 151656,
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def hf_folder(request, tmp_path_factory):
    return request.param, write_hf_folder(tmp_path_factory.mktemp("hf") / request.param, request.param)


@pytest.fixture
def changed(tmp_path):
    """Writes a Keye-VL-1.5 folder and changes entries of its config.json; None removes."""

    def write(**changes):
        folder = write_hf_folder(tmp_path / "changed", "keye_vl_1_5")
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
        return folder

    return write


def test_8b_preview_is_written_as_published():
    model = load_config("keye_vl_preview_8b").model
    written = make_hf_config(model, RELEASED_IDS, 40960)
    assert {name: written.get(name) for name in PREVIEW_8B} == PREVIEW_8B
    assert {name: written["vision_config"].get(name) for name in PREVIEW_8B_VISION} == PREVIEW_8B_VISION


def test_what_is_written_is_read_back(hf_folder):
    variant, folder = hf_folder
    assert read_hf_config(folder) == small_model(variant)
    assert read_max_positions(folder) == MAX_POSITIONS


def test_rope_parameters_of_newer_files_are_read(changed):
    rope = {"rope_theta": 5e6, "rope_type": "default", "mrope_section": [8, 4, 4]}
    decoder = read_hf_config(changed(rope_theta=None, rope_scaling=None, rope_parameters=rope)).decoder
    assert (decoder.rope_base, decoder.mrope_section) == (5e6, (8, 4, 4))


def test_settings_of_the_vision_tower_are_read(changed):
    vision = make_hf_config(small_model("keye_vl_1_5"), dict.fromkeys(RELEASED_IDS, 0), 64)["vision_config"]
    given = {"layer_norm_eps": 1e-4, "rope_theta": 500.0, "image_size": 280}
    read = read_hf_config(changed(vision_config=vision | given)).vision
    assert (read.norm_eps, read.rope_base, read.position_table_side) == (1e-4, 500.0, 20)
    absent = {name: value for name, value in vision.items() if name not in given}
    assert read_hf_config(changed(vision_config=absent)).vision == small_model("keye_vl_1_5").vision


def test_position_tables_of_any_size_are_written():
    vision = small_model("keye_vl_1_5").vision.model_copy(update={"position_table_side": 20, "norm_eps": 1e-4, "rope_base": 500.0})
    model = small_model("keye_vl_1_5").model_copy(update={"vision": vision})
    written = make_hf_config(model, RELEASED_IDS, 64)["vision_config"]
    assert (written["image_size"], written["layer_norm_eps"], written["rope_theta"]) == (280, 1e-4, 500.0)


def test_a_missing_head_dim_is_an_equal_share(changed):
    assert read_hf_config(changed(head_dim=None)).decoder.head_dim == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["KeyeForConditionalGeneration"]}, r"names keye_vl_preview.*\[144\].*\[576\].*that of keye_vl_1_5"),
        ({"architectures": ["LlavaForConditionalGeneration"]}, "is no Keye-VL folder"),
        ({"num_hidden_layers": None, "rms_norm_eps": None}, "(?s)num_hidden_layers is missing.*rms_norm_eps is missing"),
        ({"attention_bias": True}, "attention_bias is True; this model has False"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "of type 'yarn'"),
        ({"vision_config": None}, "no vision_config"),
        ({"num_hidden_layers": "many"}, "impossible settings"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": 3}}, "impossible settings"),
    ],
)
def test_other_models_are_refused(changed, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read_hf_config(changed(**changes))


def test_files_that_cannot_be_read(tmp_path, changed):
    with pytest.raises(CheckpointError, match=r"cannot read .*config.json"):
        read_hf_config(tmp_path)
    folder = changed(max_position_embeddings=None)
    with pytest.raises(CheckpointError, match="max_position_embeddings is None"):
        read_max_positions(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_hf_config(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="a JSON list"):
        read_hf_config(folder)
