"""Runs whose placement goes by measured times: same samples, same losses up to rounding, and the file's version in the checkpoint."""

import json

import pytest
import torch.distributed as dist

from megatron_keye.checkpoint.manifest import MANIFEST
from megatron_keye.errors import SettingsError
from megatron_keye.plan.ledger import StepLine
from megatron_keye.train.calibration import COSTS, FLOPS, require_same_everywhere, save_calibration
from megatron_keye.train.ledger import read_ledger
from megatron_keye.train.run_dir import RunDir
from tests.tiny import losses, on_ranks, read_lines, train
from tests.unit.train.test_calibration import calibration


def write(config, path, **part):
    save_calibration(calibration(config, **part), path)
    return f"data.cost_file={path}"


def costs_of(path) -> list[str]:
    """What the checkpoints of a run say that placement went by, oldest first."""
    return [json.loads((folder / MANIFEST).read_text())["run"]["versions"][COSTS] for folder in sorted(RunDir(path).checkpoints.iterdir())]


def samples_of(path) -> list[tuple[int, ...]]:
    """The samples of each step of a run, by its ledger."""
    return [line.samples for line in read_ledger(RunDir(path).ledger) if isinstance(line, StepLine)]


def test_measured_times_change_placement_alone(tiny, tmp_path):
    plain, cost_file = tiny.config("train.steps=4"), write(tiny.config(), tmp_path / "costs.json", item_ps=10**10)
    timed = tiny.config("train.steps=4", cost_file)
    train("dp2", plain, tmp_path / "plain")
    train("dp2", timed, tmp_path / "timed")
    by_flops, by_times = (read_lines(RunDir(tmp_path / name).metrics) for name in ("plain", "timed"))
    assert samples_of(tmp_path / "timed") == samples_of(tmp_path / "plain")
    assert list(losses(tmp_path / "timed").values()) == pytest.approx(list(losses(tmp_path / "plain").values()), rel=1e-5)
    name = "decoder_imbalance_predicted"
    assert [line[name] for line in by_times] != [line[name] for line in by_flops], "predicted by the costs that placement went by"
    for line in by_times:
        assert line["vision_drift"] > 0 and line["decoder_drift"] > 0
    for line in by_flops:
        assert "vision_drift" not in line
        assert 0 <= line["slowest_rank"] < 2


def test_a_resumed_run_may_go_by_other_times_and_says_so(tiny, tmp_path, capfd):
    first = calibration(tiny.config())
    costs = write(tiny.config(), tmp_path / "costs.json")
    path = tmp_path / "run"
    train("dp2", tiny.config("train.steps=2", costs), path)
    assert costs_of(path) == [first.digest]
    (path / "DONE").unlink()
    train("dp2", tiny.config("train.steps=4", costs), path)
    assert "other costs" not in capfd.readouterr().err
    (path / "DONE").unlink()
    train("dp2", tiny.config("train.steps=6"), path)
    assert "placement goes by other costs than before the checkpoint" in capfd.readouterr().err
    assert costs_of(path) == [first.digest, FLOPS]
    train("dp2", tiny.config("train.steps=6"), tmp_path / "undisturbed")
    assert samples_of(path) == samples_of(tmp_path / "undisturbed")


def differing_rank(config):
    own = calibration(config, decoder_token_ps=900 + (dist.get_rank() == 1))
    with pytest.raises(SettingsError) as caught:
        require_same_everywhere(own, dist.group.WORLD)
    require_same_everywhere(calibration(config), dist.group.WORLD)
    return str(caught.value)


def test_ranks_with_different_files_stop_at_once(tiny):
    messages = on_ranks("dp2", tiny.config(), differing_rank)
    assert len(set(messages)) == 1
    assert "data.cost_file has another content on ranks [1]" in messages[0]
