"""Whole runs whose pixels come from servers that die meanwhile: the same losses, ledger and weights as without servers."""

import json
import os
import signal

import pytest
import torch

from megatron_keye.train.run_dir import RunDir
from tests.tiny import losses, train
from tests.unit.io_server.processes import ServerProcess


@pytest.fixture(scope="module")
def local(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("local")
    return path, train("dp2", tiny.config(), path)


@pytest.fixture
def servers(tiny, tmp_path):
    """Two servers, found through a registry, with a secret."""
    (secret := tmp_path / "secret").write_text("a secret of this test only")
    secret.chmod(0o600)
    arguments = ("--root", str(tiny.folder), "--secret-file", str(secret), "--registry", str(tmp_path / "registry"))
    processes = [ServerProcess(*arguments) for _ in range(2)]
    for process in processes:
        process.wait_for("listening")
    yield processes
    for process in processes:
        process.kill()


def kill_at(deaths, counts_folder):
    """A hook that ends servers before steps, {steps done: pid}, and writes down in the end where pixels came from."""

    def hook(training, phase, finished):
        if phase == "step" and finished in deaths and training.runtime.groups.rank == 0:
            os.kill(deaths[finished], signal.SIGKILL)
        if phase == "save" and finished == 6:
            values = training._media.client.counts.values
            (counts_folder / f"counts{training.runtime.groups.rank}.json").write_text(json.dumps(values))

    return hook


def test_servers_that_die_one_after_the_other_change_nothing(tiny, local, servers, tmp_path):
    media = (f"data.media.registry={tmp_path / 'registry'}", f"data.media.secret_file={tmp_path / 'secret'}")
    config = tiny.config(*media, "data.prefetch_steps=0")
    path = tmp_path / "remote"
    weights = train("dp2", config, path, kill_at({2: servers[0].pid, 4: servers[1].pid}, tmp_path))
    local_path, local_weights = local
    assert losses(path) == losses(local_path)
    assert RunDir(path).ledger.read_text() == RunDir(local_path).ledger.read_text()
    assert weights.keys() == local_weights.keys()
    assert all(torch.equal(weight, local_weights[name]) for name, weight in weights.items())
    for rank in range(2):
        counts = json.loads((tmp_path / f"counts{rank}.json").read_text())
        assert counts["remote"] > 0
        assert counts["local"] > 0
        assert counts["failed"] > 0
