"""What a conversion refuses: every reason is named, and nothing is left behind."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.checkpoint.converting import INDEX, TRAINED, leftovers, mixed_tensors, refused, run, write_released
from tests.unit.checkpoint.hf_folder import save_hf_weights


@pytest.fixture
def source(tmp_path):
    return write_released(tmp_path / "hf", "keye_vl_1_5")


@pytest.fixture
def convert_it(source, tmp_path, capsys):
    def convert_it() -> str:
        message = refused(capsys, "hf-to-megatron", "--input", source, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists() and not leftovers(tmp_path)
        return message

    return convert_it


def test_missing_and_truncated_shards_are_all_named(source, convert_it):
    shards = sorted(source.glob("model-*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-8])
    shards[2].write_bytes(shards[2].read_bytes()[:20])
    message = convert_it()
    for shard in shards[:3]:
        assert message.count(f"{shard.name} cannot be read as safetensors") == 1
    assert "the file is cut off" in message and "No such file" in message


def test_index_and_files_that_disagree(source, convert_it):
    index = json.loads((source / INDEX).read_text())
    lost = index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["model.ghost.weight"] = lost
    (source / INDEX).write_text(json.dumps(index))
    message = convert_it()
    assert f"{lost} does not hold model.ghost.weight" in message
    assert f"{lost} holds model.norm.weight, which {INDEX} does not name" in message


def test_unknown_missing_and_misshapen_tensors(source, convert_it):
    tensors = mixed_tensors("keye_vl_1_5")
    del tensors["model.norm.weight"], tensors[TRAINED]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    save_hf_weights(source, tensors, 1 << 30)
    message = convert_it()
    for part in (
        "model.norm.weight [64] is missing", f"{TRAINED} [96, 64] is missing", "lm_head.weight is [415, 64], expected [416, 64]",
        "model.layers.7.mlp.up_proj.weight [2] is not of this model",
    ):  # fmt: skip
        assert part in message


def test_types_that_are_not_weights(source, convert_it):
    save_hf_weights(source, mixed_tensors("keye_vl_1_5"), 1 << 30)
    tensors = load_file(source / "model.safetensors") | {TRAINED: torch.zeros(96, 64, dtype=torch.int8)}
    save_file(tensors, source / "model.safetensors")
    assert f"{TRAINED} has the type I8, expected one of F64" in convert_it()


def test_unknown_architecture_and_the_other_variant(source, convert_it):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["LlavaForConditionalGeneration"]}))
    assert "is no Keye-VL folder" in convert_it()
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["KeyeForConditionalGeneration"], "model_type": "Keye"}))
    assert "names keye_vl_preview, whose mlp_AR.pre_norm.weight is [144], but the weights have [576]" in convert_it()


def test_no_tokenizer(source, convert_it):
    (source / "tokenizer.json").unlink()
    assert "no tokenizer in" in convert_it()


def test_a_disk_that_is_too_small(convert_it, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
    assert "0.0 GB free, and 0.1 GB are needed" in convert_it()


def test_not_even_a_model(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no model" in refused(capsys, "inspect", tmp_path / "empty")
    message = refused(capsys, "megatron-to-hf", "--input", tmp_path / "empty", "--output", tmp_path / "out")
    assert "neither a checkpoint" in message


@pytest.mark.parametrize("position", [100_000, -1])
def test_a_damaged_checkpoint_gives_nothing(source, tmp_path, capsys, position):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    assert run("hf-to-megatron", "--input", source, "--output", checkpoint) == 0
    (file,) = checkpoint.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    assert "its bytes have changed" in refused(capsys, "megatron-to-hf", "--input", checkpoint, "--output", out)
    assert not out.exists() and not leftovers(tmp_path)
