"""Runs that start from Hugging Face weights at any layout, and their checkpoints exported: between two layouts nothing is lost."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from data_tools import convert
from megatron_keye.checkpoint.convert import export_hf
from megatron_keye.checkpoint.hf_config import make_hf_config
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.errors import KeyeError
from megatron_keye.model.init import proof_tensor
from megatron_keye.model.tensors import canonical_shapes
from megatron_keye.parallel.launch import WorkerError
from megatron_keye.train import live_export
from megatron_keye.train.run_dir import RunDir
from tests.tiny import no_hook, train
from tests.unit.checkpoint.hf_folder import PREPROCESSOR, save_hf_weights

LAYOUTS = ("dp2", "tp2sp", "pp2vp2", "cp2")
FROZEN = "model.freeze=[vision, projector, embedding]"
LAST = {"train.steps=2", "train.save_every_steps=1"}


@pytest.fixture(scope="module")
def hf_folder(tiny, tmp_path_factory):
    """bfloat16 weights of the tiny model, as a Hugging Face folder with the set's tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    model = tiny.config().model
    weights = {name: proof_tensor(name, shape, 0.1, seed=9).bfloat16() for name, shape in canonical_shapes(model).items()}
    save_hf_weights(folder, weights, 100_000)
    (folder / "tokenizer.json").write_bytes((tiny.folder / "tokenizer/tokenizer.json").read_bytes())
    config = make_hf_config(model, load_tokenizer(folder, model.variant).vocab, 4096) | {"auto_map": {"AutoModel": "modeling_keye.Keye"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "modeling_keye.py").write_text("# remote code\n")
    return folder


def weights_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_from_hf_weights_differs_only_where_it_trains(tiny, hf_folder, tmp_path, layout):
    """Two steps in bfloat16 with everything but the decoder frozen; the way back finds the folder's other files by itself."""
    config = tiny.config(f"model.init_from={hf_folder}", "train.precision=bf16", "optimizer.lr=1e-2", FROZEN, *LAST)
    train(layout, config, tmp_path / "run")
    assert convert.main(["megatron-to-hf", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "back")]) == 0
    before, after = weights_of(hf_folder), weights_of(tmp_path / "back")
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {name: (t.dtype, t.shape) for name, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name in before if name.startswith(("model.layers.", "model.norm.", "lm_head."))}
    assert changed <= trained
    assert {name for name in trained if name.endswith("proj.weight")} <= changed
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "modeling_keye.py"):
        assert (tmp_path / "back" / name).read_bytes() == (hf_folder / name).read_bytes(), name


@pytest.mark.parametrize(("layout", "precision"), [("one", "fp32"), ("tp2sp", "fp32"), ("dp2", "bf16")])
def test_a_learning_rate_of_zero_changes_nothing(tiny, hf_folder, tmp_path, layout, precision):
    """Every tensor reaches the main weights of every layout, and its checkpoint, bit for bit."""
    still = ("optimizer.lr=1e-30", "optimizer.weight_decay=0.0")
    config = tiny.config(f"model.init_from={hf_folder}", f"train.precision={precision}", *still, *LAST)
    train(layout, config, tmp_path / "run")
    export_hf(tmp_path / "run", 1 << 30, dtype="bfloat16").write(tmp_path / "back")
    before, after = weights_of(hf_folder), weights_of(tmp_path / "back")
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("start", ["converted", "run"])
def test_a_run_starts_from_a_checkpoint_of_another_layout(tiny, hf_folder, tmp_path, start):
    config = tiny.config(f"model.init_from={hf_folder}", *LAST)
    if start == "run":
        train("tp2sp", config, tmp_path / "source")
        expected = weights_of_export(tmp_path / "source", tmp_path / "expected")
    else:
        assert convert.main(["hf-to-megatron", "--input", str(hf_folder), "--output", str(tmp_path / "source")]) == 0
        expected = {name: tensor.float() for name, tensor in weights_of(hf_folder).items()}
    still = ("optimizer.lr=1e-30", "optimizer.weight_decay=0.0")
    train("pp2", tiny.config(f"model.init_from={tmp_path / 'source'}", *still, *LAST), tmp_path / "run")
    found = weights_of_export(tmp_path / "run", tmp_path / "found")
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_modules_start_from_folders_of_their_own(tiny, hf_folder, tmp_path):
    """The ViT comes from a run whose decoder is another one, the projector is fresh and the same at every layout."""
    still = ("optimizer.lr=1e-30", "optimizer.weight_decay=0.0")
    train("dp2", tiny.config("model.decoder.num_layers=2", "train.seed=5", *LAST), tmp_path / "vit")
    parts = (f"model.init_parts.vision={tmp_path / 'vit'}", "model.init_parts.projector=fresh")
    runs = {}
    for layout in ("dp2", "tp2sp"):
        train(layout, tiny.config(f"model.init_from={hf_folder}", *parts, *still, *LAST), tmp_path / layout)
        runs[layout] = weights_of_export(tmp_path / layout, tmp_path / f"{layout}_hf")
    found, other = runs.values()
    trained, released = weights_of_export(tmp_path / "vit", tmp_path / "vit_hf"), weights_of(hf_folder)
    for name, tensor in found.items():
        assert torch.allclose(tensor, other[name], rtol=0, atol=1e-20), name
        if name.startswith("visual."):
            assert torch.equal(tensor, trained[name]), name
        elif name.startswith("mlp_AR."):
            assert not torch.equal(tensor, released[name].float()) or "norm" in name or "bias" in name, name
        else:
            assert torch.equal(tensor, released[name].float()), name


def weights_of_export(run, output):
    export_hf(run, 1 << 30).write(output)
    return weights_of(output)


def test_weights_of_another_model_are_refused_on_all_ranks(tiny, hf_folder, tmp_path):
    with pytest.raises((WorkerError, KeyeError), match=r"expected \[") as error:
        train("tp2", tiny.config(f"model.init_from={hf_folder}", "model.decoder.ffn_hidden_size=128"), tmp_path / "run")
    assert "mlp.up_proj.weight is [96, 64], expected [128, 64]" in str(error.value)
    with pytest.raises((WorkerError, KeyeError), match="has neither"):
        train("dp2", tiny.config(f"model.init_from={tmp_path}"), tmp_path / "other")


def test_exports_while_training(tiny, hf_folder, tmp_path):
    """Every second step and the last, though only one checkpoint is kept; each is the export of its checkpoint."""
    exporting = ("train.export_hf_every_steps=2", "train.save_every_steps=1", "train.steps=5", "train.keep_checkpoints=1")
    train("dp2", tiny.config(f"model.init_from={hf_folder}", *exporting), tmp_path / "run")
    folder = tmp_path / "run" / "hf"
    assert sorted(path.name for path in folder.iterdir()) == ["step_2", "step_4", "step_5"]
    last = weights_of_export(tmp_path / "run", tmp_path / "last")
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights_of(folder / "step_5").items())
    assert not torch.equal(weights_of(folder / "step_2")["lm_head.weight"], last["lm_head.weight"])
    assert (folder / "step_2" / "modeling_keye.py").is_file()


def test_an_export_that_was_killed_with_its_run_is_taken_up(tiny, hf_folder, tmp_path, monkeypatch):
    """The exporter never gets to work, and the run is killed; the next start of the run exports the step it had got to."""
    exporting = ("train.export_hf_every_steps=2", "train.save_every_steps=2", "train.steps=4", "train.keep_checkpoints=1")
    config = tiny.config(f"model.init_from={hf_folder}", *exporting)

    def die(training, phase, step):
        if (phase, step) == ("step", 3):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(live_export, "WORKER", "tests.dist.no_such_module")
    with pytest.raises(WorkerError):
        train("one", config, tmp_path / "run", die)
    folder = tmp_path / "run" / "hf"
    assert [path.name for path in folder.iterdir()] == [".step_2.source"]
    monkeypatch.undo()
    train("one", config, tmp_path / "run", no_hook)
    assert sorted(path.name for path in folder.iterdir()) == ["step_2", "step_4"]
    assert len(weights_of(folder / "step_2")) == len(weights_of(hf_folder))


def test_an_export_that_fails_is_said_and_does_not_stop_the_run(tiny, hf_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(live_export, "WORKER", "tests.dist.no_such_module")
    config = tiny.config(f"model.init_from={hf_folder}", "train.export_hf_every_steps=2", "train.save_every_steps=2", "train.steps=2")
    train("one", config, tmp_path / "run")
    assert RunDir(tmp_path / "run").is_done
    output = capfd.readouterr()
    assert "step_2 was not exported" in output.out + output.err and "no_such_module" in output.out + output.err
