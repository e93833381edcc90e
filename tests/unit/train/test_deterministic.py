"""train.deterministic: what a process asks of its libraries, and that a run on CPU is what it was without."""

import os

import pytest
import torch

from megatron_keye.config.load import dump_config
from megatron_keye.train import runtime
from tests.tiny import losses
from tests.unit.train.forked import in_a_fork, keye


def started(config) -> tuple[str, str]:
    """What an operation without a fixed order of its additions ends with, and what cuBLAS will find."""
    runtime.start(config)
    try:
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
    except RuntimeError as error:
        return str(error), os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
    return "", os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")


@pytest.mark.parametrize(("deterministic", "refused", "workspace"), [(True, "does not have a deterministic", ":4096:8"), (False, "", "")])
def test_what_a_process_asks_of_its_libraries(tiny, deterministic, refused, workspace):
    error, found = in_a_fork(started, tiny.config(f"train.deterministic={str(deterministic).lower()}"))
    assert refused in error
    assert bool(refused) == bool(error)
    assert found == workspace


def test_a_run_on_cpu_is_what_it_was(tiny, tmp_path):
    settings = tmp_path / "tiny.yaml"
    settings.write_text(dump_config(tiny.config("train.steps=3")))
    for name, value in (("plain", "false"), ("exact", "true")):
        code, said = keye("train", settings, "--run-dir", tmp_path / name, "--set", f"train.deterministic={value}")
        assert code == 0, said
    assert losses(tmp_path / "plain") == losses(tmp_path / "exact")
