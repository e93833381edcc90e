"""Sources of tensors, how they are cut into blocks and files, and config.json when the model has changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.checkpoint.files import TensorSpec
from megatron_keye.checkpoint.hf_config import make_hf_config, model_of_hf_config, update_hf_config
from megatron_keye.checkpoint.hf_weights import HfTensors, write_hf_weights
from megatron_keye.checkpoint.tensors import Cast, Combined, MemoryTensors, Renamed, divide, row_blocks, row_ranges, total_bytes
from tests.unit.checkpoint.hf_folder import small_model

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
specs = st.builds(TensorSpec, shapes, dtypes)


@given(specs, st.integers(1, 200))
def test_blocks_cover_the_rows_once_in_order(spec, max_bytes):
    ranges = list(row_ranges(spec, max_bytes))
    num_rows = spec.shape[0] if spec.shape else 1
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(num_rows))
    row_bytes = spec.num_bytes // num_rows if num_rows else 0
    assert all((stop - start) * row_bytes <= max_bytes or stop - start == 1 for start, stop in ranges)


@given(st.dictionaries(st.text(min_size=1), specs, max_size=8), st.integers(1, 3000))
def test_files_hold_every_tensor_once_and_no_file_is_too_large(tensors, max_bytes):
    files = divide(tensors, max_bytes)
    assert {name: spec for file in files for name, spec in file.items()} == tensors
    assert [name for file in files for name in file] == list(tensors)
    assert all(total_bytes(file) <= max_bytes or sum(spec.num_bytes > 0 for spec in file.values()) == 1 for file in files)
    for file, following in zip(files, files[1:], strict=False):
        assert total_bytes(file) + next(iter(following.values())).num_bytes > max_bytes, "the next tensor would have fitted"


@settings(max_examples=40, deadline=None)
@given(st.lists(specs, min_size=1, max_size=5), st.integers(1, 3000))
def test_what_is_written_is_read(tmp_path_factory, given_specs, max_bytes):
    folder = tmp_path_factory.mktemp("hf")
    tensors = {f"t{number}": torch.randn(spec.shape).to(spec.dtype) for number, spec in enumerate(given_specs)}
    told = []
    write_hf_weights(folder, MemoryTensors(tensors), max_bytes, told.append)
    source = HfTensors(folder)
    assert set(source.specs) == set(tensors)
    for name, tensor in tensors.items():
        assert source.specs[name] == TensorSpec(tuple(tensor.shape), tensor.dtype)
        blocks = [block.reshape(-1) for block in row_blocks(source, name)]
        assert torch.equal(torch.cat(blocks) if blocks else tensor.new_empty(0), tensor.reshape(-1))
    assert sum(told) >= total_bytes(source.specs)


def test_sources_are_put_together():
    a, b = MemoryTensors({"x": torch.arange(6.0).view(3, 2)}), MemoryTensors({"y": torch.ones(2)})
    both = Combined((Renamed(a, {"z": "x"}), Cast(b, torch.float16)))
    assert dict(both.specs) == {"z": TensorSpec((3, 2), torch.float32), "y": TensorSpec((2,), torch.float16)}
    assert torch.equal(both.read_rows("z", 1, 3), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    assert torch.equal(both.read_rows("y", 0, 2), torch.ones(2, 1, dtype=torch.float16))


SHAPES = {"mlp_AR.pre_norm.weight": (576,), "visual.vision_model.embeddings.packing_position_embedding.weight": (8, 144)}
CHANGES = {
    "rope_base": ({"rope_base": 5e5}, {"rope_theta": 5e5}),
    "sections": ({"mrope_section": (8, 4, 4)}, {"rope_scaling": {"type": "mrope", "mrope_section": [8, 4, 4]}}),
    "eps": ({"norm_eps": 1e-3}, {"rms_norm_eps": 1e-3}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_config_json_changes_only_where_the_model_did(tmp_path, change):
    update, expected = CHANGES[change]
    old = small_model("keye_vl_1_5")
    raw = make_hf_config(old, {}, 64) | {"auto_map": {"AutoModel": "x.Y"}}
    path = tmp_path / "config.json"
    assert model_of_hf_config(raw, path, SHAPES) == old
    assert update_hf_config(raw, old, old) == raw
    new = old.model_copy(update={"decoder": old.decoder.model_copy(update=update)})
    written = update_hf_config(raw, old, new)
    assert {name for name in written if written[name] != raw.get(name)} == set(expected)
    assert model_of_hf_config(written, path, SHAPES) == new


def test_newer_files_and_the_vision_tower_are_updated_in_place(tmp_path):
    old = small_model("keye_vl_1_5")
    raw = make_hf_config(old, {}, 64)
    rope = raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 8e6, "mrope_section": [4, 6, 6]}, "rope_scaling": None}
    del rope["rope_theta"]
    decoder, vision = old.decoder.model_copy(update={"rope_base": 1e4}), old.vision.model_copy(update={"norm_eps": 1e-4})
    new = old.model_copy(update={"decoder": decoder, "vision": vision})
    written = update_hf_config(rope, old, new)
    assert "rope_theta" not in written and written["rope_parameters"]["rope_type"] == "default"
    assert model_of_hf_config(written, tmp_path, SHAPES) == new
