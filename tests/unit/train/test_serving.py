"""Opening a run on one process."""

import shutil

import pytest
import torch

from megatron_keye.errors import CheckpointError, SettingsError
from megatron_keye.train.serving import open_run
from tests.unit.checkpoint.hf_folder import tensors_of, write_hf_folder
from tests.unit.train.forked import in_a_fork
from tests.unit.train.saved_run import STEP, save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(folder / "run", write_hf_folder(folder / "hf", "keye_vl_1_5"), "keye_vl_1_5")
    return folder / "run"


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def opened(path, overrides):
    """What the run was opened with, and the names of weights that are not those that were saved."""
    found = open_run(path, overrides)
    weights = tensors_of(found.config.model)
    wrong = [p.name for p in found.model.pieces() if not torch.equal(p.read().float(), weights[p.name].to(found.model.dtype).float())]
    trainable = [p for module in (found.model.encoder, *found.model.chunks) for p in module.parameters() if p.requires_grad]
    return found.step, found.config, wrong, len(trainable)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_of_another_layout_opens_on_one_process(run, precision):
    step, config, wrong, num_trainable = in_a_fork(opened, run, ["parallel.tp=2", "parallel.pp=2", f"train.precision={precision}"])
    assert (step, wrong, num_trainable) == (STEP, [], 0)
    assert (config.parallel.tp, config.parallel.pp, config.train.precision) == (1, 1, precision)


def test_folders_that_are_no_run(tmp_path, copy):
    with pytest.raises(SettingsError, match="is not a run directory: it has no config.yaml"):
        open_run(tmp_path)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_run(copy)


def test_another_tokenizer_is_refused(copy, tmp_path):
    other = write_hf_folder(tmp_path / "other", "keye_vl_1_5")
    (other / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was trained with a tokenizer of fingerprint"):
        open_run(copy, [f"data.tokenizer={other}"])


def test_other_sizes_than_those_saved_are_refused(copy):
    message = in_a_fork(refusal, copy, ["model.decoder.num_layers=3"])
    assert "is not in the checkpoint" in message


def refusal(path, overrides) -> str:
    try:
        open_run(path, overrides)
    except CheckpointError as error:
        return str(error)
    return "opened"


def test_more_than_one_process_is_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="runs on one process"):
        open_run(run)
