"""Reading and writing safetensors folders: exact, and damage is named."""

import json

import pytest
import torch
from safetensors import safe_open

from megatron_keye.checkpoint.hf_weights import INDEX_FILE, WHOLE_FILE, load_hf_weights
from megatron_keye.errors import CheckpointError
from megatron_keye.model.names import Piece
from tests.unit.checkpoint.hf_folder import save_hf_weights

SHAPES = {"a.weight": (6, 4), "b.bias": (5,), "c.probe": (1, 1, 3), "d.empty": (0, 4)}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def whole(name, shape, dtype=torch.float32):
    return Piece(name, shape, (0,) * len(shape), shape, torch.full(shape, torch.nan, dtype=dtype))


def shapes_of(pieces):
    return {piece.name: piece.full_shape for piece in pieces}


@pytest.mark.parametrize("max_shard_bytes", [1 << 20, 100, 1])
def test_what_is_saved_is_loaded(tmp_path, tensors, max_shard_bytes):
    save_hf_weights(tmp_path, tensors, max_shard_bytes)
    pieces = [whole(name, shape) for name, shape in SHAPES.items()]
    load_hf_weights(tmp_path, pieces, shapes_of(pieces))
    for piece in pieces:
        assert torch.equal(piece.view, tensors[piece.name])


def test_a_part_is_loaded_whatever_the_rest_is(tmp_path, tensors):
    """Only the tensors that count have to be those of the model."""
    save_hf_weights(tmp_path, tensors, 1 << 20)
    (part,) = pieces = [whole("a.weight", SHAPES["a.weight"])]
    load_hf_weights(tmp_path, pieces, shapes_of(pieces), counts=lambda name: name.startswith("a."))
    assert torch.equal(part.view, tensors["a.weight"])
    with pytest.raises(CheckpointError, match="b.bias .* is not of this model"):
        load_hf_weights(tmp_path, pieces, shapes_of(pieces))


def test_shards_keep_order_and_size(tmp_path, tensors):
    save_hf_weights(tmp_path, tensors, max_shard_bytes=100)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert {n: f.split("-")[1] for n, f in index["weight_map"].items()} == {
        "a.weight": "00001", "b.bias": "00002", "c.probe": "00002", "d.empty": "00002",
    }  # fmt: skip
    with safe_open(tmp_path / "model-00001-of-00002.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_parts_are_read_in_place_and_converted(tmp_path, tensors):
    save_hf_weights(tmp_path, tensors, 1 << 20)
    parameter = torch.zeros(3, 2, 2, dtype=torch.bfloat16)
    part = Piece("a.weight", (6, 4), (2, 0), (3, 4), parameter)
    load_hf_weights(tmp_path, [part], SHAPES)
    assert torch.equal(parameter.reshape(3, 4), tensors["a.weight"][2:5].bfloat16())


def test_every_difference_is_listed_and_nothing_is_written(tmp_path, tensors):
    save_hf_weights(tmp_path, tensors, 100)
    wanted = {"a.weight": (6, 5), "b.bias": (5,), "d.empty": (0, 4), "e.weight": (2, 2), "f.weight": (3,)}
    pieces = [whole(name, shape) for name, shape in wanted.items()]
    with pytest.raises(CheckpointError) as error:
        load_hf_weights(tmp_path, pieces, shapes_of(pieces))
    text = str(error.value)
    assert "e.weight [2, 2] is missing" in text and "f.weight [3] is missing" in text
    assert "c.probe [1, 1, 3] is not of this model" in text
    assert "a.weight is [6, 4], expected [6, 5]" in text
    assert all(piece.view.isnan().all() for piece in pieces)


def test_damage_is_named(tmp_path, tensors):
    with pytest.raises(CheckpointError, match=f"neither {INDEX_FILE} nor {WHOLE_FILE}"):
        load_hf_weights(tmp_path, [], {})
    save_hf_weights(tmp_path, tensors, 100)
    pieces = [whole(name, shape) for name, shape in SHAPES.items()]
    second = tmp_path / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors cannot be read as safetensors"):
        load_hf_weights(tmp_path, pieces, shapes_of(pieces))
    second.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors cannot be read as safetensors"):
        load_hf_weights(tmp_path, pieces, shapes_of(pieces))
    second.write_bytes(content)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["b.bias"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors does not hold b.bias"):
        load_hf_weights(tmp_path, pieces, shapes_of(pieces))
    index["weight_map"]["b.bias"] = "../elsewhere.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no weight_map"):
        load_hf_weights(tmp_path, pieces, shapes_of(pieces))
