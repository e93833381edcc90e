"""`verify` and `inspect`: every difference and every damaged file is named."""

import os

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.checkpoint.converting import refused, run
from tests.unit.checkpoint.hf_folder import write_hf_folder
from tests.unit.train.saved_run import save_run


@pytest.fixture
def folders(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3), "c": torch.ones(2), "d": torch.zeros(2)}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "one/model.safetensors")

    def other(**changes):
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        save_file(changed, tmp_path / "two/model.safetensors")
        return tmp_path / "one", tmp_path / "two"

    return other


def test_every_kind_of_difference_is_named(folders, capsys):
    moved = torch.arange(6.0).reshape(2, 3)
    moved[1, 2] += 0.25
    moved[0, 0] -= 0.125
    first, second = folders(a=moved, b=torch.ones(3, dtype=torch.float16), c=torch.ones(1, 2), d=None, e=torch.ones(1))
    assert run("verify", first, second) == 1
    assert capsys.readouterr().out.splitlines() == [
        "a F32 [2, 3] differs in 2 elements; largest difference 2.500e-01",
        "b is F32 [3] in the first, F16 [3] in the second; largest difference 0.000e+00",
        "c is F32 [2] in the first, F32 [1, 2] in the second",
        "d F32 [2] is only in the first",
        "e F32 [1] is only in the second",
        "5 of 4 tensors differ",
    ]


@pytest.mark.parametrize(("value", "largest"), [(-0.0, "0.000e+00"), (float("nan"), "inf"), (float("inf"), "inf")])
def test_bits_count_and_no_number_is_infinitely_far(folders, capsys, value, largest):
    assert run("verify", *folders(d=torch.tensor([0.0, value]))) == 1
    assert f"d F32 [2] differs in 1 elements; largest difference {largest}" in capsys.readouterr().out


def test_equal_folders(folders, capsys):
    assert run("verify", *folders()) == 0
    assert "4 tensors, equal in every bit" in capsys.readouterr().out


def test_inspect_says_what_it_is(tmp_path, capsys):
    source = write_hf_folder(tmp_path / "hf", "keye_vl_preview")
    assert run("hf-to-megatron", "--input", source, "--output", tmp_path / "checkpoint") == 0
    save_run(tmp_path / "run", source, "keye_vl_preview")
    capsys.readouterr()
    texts = {}
    for name in ("hf", "checkpoint", "run"):
        assert run("inspect", tmp_path / name) == 0
        texts[name] = capsys.readouterr().out
    for text in texts.values():
        assert "variant    keye_vl_preview" in text and "F32" in text
        assert len({line for t in texts.values() for line in t.splitlines() if line.startswith("parameters")}) == 1
    assert "Hugging Face folder" in texts["hf"] and "converted checkpoint, without" in texts["checkpoint"]
    assert "training checkpoint of step 7, without optimizer state" in texts["run"]


@pytest.mark.parametrize("kind", ["hf", "checkpoint", "run"])
def test_a_file_that_is_cut_off_is_named(tmp_path, capsys, kind):
    """By both commands, whatever the folder is; `verify` also where it is the second."""
    whole = write_hf_folder(tmp_path / "whole", "keye_vl_preview")
    source = write_hf_folder(tmp_path / "hf", "keye_vl_preview", max_shard_bytes=200_000)
    assert run("hf-to-megatron", "--input", source, "--output", tmp_path / "checkpoint") == 0
    save_run(tmp_path / "run", source, "keye_vl_preview")
    shard = sorted((tmp_path / kind).rglob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 8)
    for command in (("inspect", tmp_path / kind), ("verify", tmp_path / kind, whole), ("verify", whole, tmp_path / kind)):
        message = refused(capsys, *command)
        assert shard.name in message and ("cut off" in message or "torn" in message)
