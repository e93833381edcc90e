"""Whole runs whose pixels come from servers that die meanwhile: the same losses, ledger and weights as without servers."""

import json
import os
import signal

import pytest
import torch

from benchmarks.slow_path import SlowPath
from megatron_keye.train.run_dir import RunDir
from tests.tiny import losses, read_lines, train
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


def signal_at(signals, counts_folder):
    """A hook that sends signals before steps, {steps done: (pid, signal)}, and writes down in the end where pixels came from."""

    def hook(training, phase, finished):
        if phase == "step" and finished in signals and training.runtime.groups.rank == 0:
            os.kill(*signals[finished])
        if phase == "save" and finished == 6:
            values = training._loading.media.client.counts.values
            (counts_folder / f"counts{training.runtime.groups.rank}.json").write_text(json.dumps(values))

    return hook


def registered(folder):
    return f"data.media.registry={folder / 'registry'}"


def run_with_servers(tiny, folder, signals, *overrides):
    """The run's folder, its weights, and where the pixels of each rank came from."""
    secret = f"data.media.secret_file={folder / 'secret'}"
    config = tiny.config(secret, "data.prefetch_steps=0", *overrides)
    weights = train("dp2", config, folder / "remote", signal_at(signals, folder))
    return folder / "remote", weights, [json.loads((folder / f"counts{rank}.json").read_text()) for rank in range(2)]


def assert_same_run(path, weights, local):
    local_path, local_weights = local
    assert losses(path) == losses(local_path)
    assert RunDir(path).ledger.read_text() == RunDir(local_path).ledger.read_text()
    assert weights.keys() == local_weights.keys()
    assert all(torch.equal(weight, local_weights[name]) for name, weight in weights.items())


def test_servers_that_die_one_after_the_other_change_nothing(tiny, local, servers, tmp_path):
    deaths = {2: (servers[0].pid, signal.SIGKILL), 4: (servers[1].pid, signal.SIGKILL)}
    path, weights, counts_by_rank = run_with_servers(tiny, tmp_path, deaths, registered(tmp_path))
    assert_same_run(path, weights, local)
    assert all(counts["remote"] > 0 for counts in counts_by_rank)
    # What is asked of the dead before their leases end fails, and may be nothing on one of the ranks; then pixels are made here.
    assert sum(counts.get("local", 0) for counts in counts_by_rank) > 0


def test_a_server_that_hangs_changes_nothing_and_costs_little(tiny, local, servers, tmp_path):
    hang = {2: (servers[0].pid, signal.SIGSTOP)}
    path, weights, counts_by_rank = run_with_servers(
        tiny, tmp_path, hang, registered(tmp_path), "data.media.hedge_after_s=0.2", "data.media.deadline_s=2.0"
    )
    assert_same_run(path, weights, local)
    assert sum(counts["hedged"] for counts in counts_by_rank if "hedged" in counts) > 0
    assert max(line["data_wait_s"] for line in read_lines(RunDir(path).metrics)) < 15.0


def test_a_server_that_is_late_by_seconds_is_hedged_and_changes_nothing(tiny, local, servers, tmp_path):
    # Which server is asked for what depends on their ports, so most of them are late: the chance that none is asked is 1 in 4,096.
    late = [SlowPath(servers[0].url, delay_s=2.0).url for _ in range(3)]
    fleet = f"data.media.servers=[{', '.join(late)}, {servers[1].url}]"
    path, weights, counts_by_rank = run_with_servers(tiny, tmp_path, {}, fleet, "data.media.hedge_after_s=0.2")
    assert_same_run(path, weights, local)
    metrics = read_lines(RunDir(path).metrics)
    # Servers are also asked in the validation, which is no step.
    assert 0 < sum(line["media_hedged"] for line in metrics) <= sum(counts["hedged"] for counts in counts_by_rank)
    assert 0 < sum(line["media_remote"] for line in metrics) <= sum(counts["remote"] for counts in counts_by_rank)
    assert all(line["media_local"] == line["media_failed"] == 0 for line in metrics)
