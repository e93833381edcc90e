"""What a dry run says of the weights that a run would start from, and what it refuses, without reading a tensor."""

import json
import os

import pytest

from data_tools import convert
from megatron_keye.checkpoint.hf_config import make_hf_config
from megatron_keye.errors import CheckpointError
from megatron_keye.model.init import proof_tensor
from megatron_keye.model.modules import module_of
from megatron_keye.model.tensors import canonical_shapes
from megatron_keye.train.dry_run import describe
from tests.unit.checkpoint.hf_folder import save_hf_weights


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    """Of the tiny model, converted."""
    folder = tmp_path_factory.mktemp("weights")
    write_hf(folder / "hf", tiny)
    assert convert.main(["hf-to-megatron", "--input", str(folder / "hf"), "--output", str(folder / "checkpoint")]) == 0
    return folder / "checkpoint"


@pytest.fixture
def hf(tiny, tmp_path):
    return write_hf(tmp_path / "hf", tiny)


def write_hf(folder, tiny):
    model = tiny.config().model
    save_hf_weights(folder, {name: proof_tensor(name, shape, 0.1, seed=9) for name, shape in canonical_shapes(model).items()}, 100_000)
    (folder / "config.json").write_text(json.dumps(make_hf_config(model, {}, 4096)))
    (folder / "tokenizer.json").write_bytes((tiny.folder / "tokenizer/tokenizer.json").read_bytes())
    return folder


def number_of(model, *modules):
    return sum(module_of(name) in modules for name in canonical_shapes(model))


def test_every_module_is_told_with_its_folder(tiny, hf, checkpoint):
    config = tiny.config(
        f"model.init_from={hf}", f"model.init_parts.projector={checkpoint}", "model.init_parts.vision=fresh", "model.decoder.rope_base=5e5"
    )
    section = next(part for part in describe(config, 1).split("\n\n") if part.startswith("weights of a new run:"))
    model, lines = config.model, section.splitlines()
    assert lines[1] == f"  from {checkpoint}:"
    assert lines[2].startswith("    projector: 6 tensors (6 F32), ")
    assert lines[3] == f"    not loaded: {number_of(model, 'vision', 'embedding', 'decoder')} tensors of vision, embedding, decoder"
    assert lines[4] == f"  from {hf}:"
    assert lines[5].startswith("    embedding: 1 tensors (1 F32), ")
    assert lines[6].startswith(f"    decoder: {number_of(model, 'decoder')} tensors")
    assert lines[7] == f"    not loaded: {number_of(model, 'vision', 'projector')} tensors of vision, projector"
    assert lines[8].startswith("    decoder.rope_base is 500000.0 here, ")
    assert lines[9:] == ["  fresh: vision"]


def test_a_run_with_fresh_weights_alone_says_nothing_of_them(tiny):
    assert "weights of a new run" not in describe(tiny.config(), 1)


def test_weights_that_cannot_be_loaded_are_refused(tiny, hf, checkpoint, tmp_path):
    for settings, said in (
        ([f"model.init_from={tmp_path / 'none'}"], "holds no model"),
        ([f"model.init_from={hf}", "model.decoder.num_layers=5"], r"model.layers.4.input_layernorm.weight \[\d+\] is missing"),
        ([f"model.init_from={checkpoint}", "model.decoder.ffn_hidden_size=32"], r"mlp.up_proj.weight is \[\d+, \d+\], expected \[32, "),
        ([f"model.init_parts.projector={hf}", "model.variant=keye_vl_preview"], r"mlp_AR.pre_norm.weight is .* expected"),
    ):
        with pytest.raises(CheckpointError, match=said):
            describe(tiny.config(*settings), 1)
    shard = sorted(hf.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=f"{shard.name} cannot be read .* cut off"):
        describe(tiny.config(f"model.init_from={hf}"), 1)
