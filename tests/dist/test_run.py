"""Whole runs of the tiny model: what is written, what a restart gives, what requests do."""

import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from megatron_keye.checkpoint.store import checkpoints
from megatron_keye.config.load import dump_config
from megatron_keye.data.mixture import ONLY_SOURCE
from megatron_keye.errors import LedgerError
from megatron_keye.parallel.launch import WorkerError
from megatron_keye.plan.cursor import Cursor
from megatron_keye.plan.ledger_proof import prove
from megatron_keye.train import cli
from megatron_keye.train.ledger import run_files
from megatron_keye.train.placement import Planner
from megatron_keye.train.recorder import PHASES
from megatron_keye.train.run_dir import RunDir
from tests.tiny import HookedTraining, ask, losses, no_hook, on_ranks, read_lines, run_as, steps_of, train

EVERY_FIELD = {
    "step", "loss", "grad_norm", "lr", "supervised_tokens", "tokens", "visual_tokens", "samples", "step_time_s", "data_wait_s",
    "encode_s", "route_s", "decoder_s", "encode_backward_s", "gradients_s", "optimizer_s", "tokens_per_s", "decoder_imbalance_predicted",
    "vision_imbalance_predicted", "decoder_imbalance_measured", "vision_imbalance_measured", "memory_bytes", "slowest_rank",
    "slowest_rank_speed",
}  # fmt: skip
"""What the metrics must hold."""


def die_in(phase, step, rank=0):
    """A hook that kills `rank` with SIGKILL when `phase` begins after `step` steps."""

    def hook(training, now, finished):
        if (now, finished, training.runtime.groups.rank) == (phase, step, rank):
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def steps_saved(path):
    return [int(folder.name.removeprefix("step_")) for folder in checkpoints(RunDir(path).checkpoints)]


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """An undisturbed run at dp2: its directory and final weights."""
    path = tmp_path_factory.mktemp("straight")
    return path, train("dp2", tiny.config(), path)


def assert_same_run(path, weights, straight):
    straight_path, straight_weights = straight
    assert losses(path) == losses(straight_path)
    assert RunDir(path).ledger.read_text() == RunDir(straight_path).ledger.read_text()
    assert weights.keys() == straight_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, straight_weights[name]), name


def test_the_metrics_hold_every_field(straight):
    lines = read_lines(RunDir(straight[0]).metrics)
    assert [line["step"] for line in lines] == list(range(6))
    for line in lines:
        assert line.keys() >= EVERY_FIELD
        assert line["samples"] == 4
        assert line["updated"] is True
        parts = [line[f"{part}_s"] for part in PHASES]
        assert all(seconds >= 0 for seconds in parts)
        # Parts are means over ranks, the whole is that of the main rank; they end every step together.
        assert sum(parts) == pytest.approx(line["step_time_s"], rel=0.3, abs=0.05)


def test_the_ledger_is_the_plans_order_and_is_proved_from_the_files(tiny, straight):
    config = tiny.config()
    data, cursor = tiny.dataset(config), Cursor()
    for line in steps_of(straight[0]):
        plan, cursor = Planner(config, num_replicas=1).over(data.plan_data)(cursor)
        assert (line.step, line.samples, line.digest) == (plan.step, plan.members, cursor.ledger.hex())
        assert tuple(line.slot_positions) == plan.positions
        assert line.ids == tuple(map(data.sample_id, plan.members))
        assert line.crc32 == tuple(map(data.record_crc32, plan.members))
        assert (line.sources, line.skipped, line.updated) == ({ONLY_SOURCE: 4}, (), True)
    assert cursor.step == 6
    proof = prove([run_files(straight[0])])
    assert (proof.steps, proof.num_samples, proof.epochs, proof.segments) == (6, 24, 1, 1)
    assert [point.steps for point in proof.agreeing] == [4, 6]


def test_the_command_proves_shows_and_compares_a_run(tiny, straight, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = str(straight[0])
    assert cli.main(["ledger", "verify", path]) == 0
    out = capsys.readouterr().out
    assert "6 " in out and "step_00000004, step_00000006" in out and "24, each position of the order once" in out
    assert cli.main(["ledger", "show", path, "--step", "3"]) == 0
    out, dataset = capsys.readouterr().out, tiny.dataset(tiny.config())
    for sample in steps_of(path)[3].samples:
        row = next(line for line in out.splitlines() if f" {dataset.sample_id(sample)} " in line)
        assert [cell.strip() for cell in row.split("│")][7:10] == [ONLY_SOURCE, dataset.task(sample), str(dataset.shape(sample).num_tokens)]
    assert cli.main(["ledger", "diff", path, path]) == 0


def test_a_run_leaves_its_settings_heartbeats_and_newest_checkpoints(tiny, straight):
    run = RunDir(straight[0])
    assert run.is_done
    assert run.config.read_text() == dump_config(tiny.config())
    assert {path.name: path.read_text().split()[::2] for path in (run.path / "heartbeats").iterdir()} == {
        "rank0": ["6", "eval"], "rank1": ["6", "eval"],
    }  # fmt: skip
    assert steps_saved(run.path) == [4, 6]
    assert [line["step"] for line in read_lines(run.validation)] == [5]
    assert list(run.tensorboard.iterdir())


def test_three_restarts_are_bitwise_one_run(tiny, tmp_path, straight):
    """Killed in a step, at the beginning of a save, and on another rank: each start goes on from the latest checkpoint."""
    for hook in (die_in("step", 1), die_in("save", 4), die_in("step", 5, rank=1)):
        with pytest.raises(WorkerError):
            train("dp2", tiny.config(), tmp_path, hook)
    assert steps_saved(tmp_path) == [2, 4]
    weights = train("dp2", tiny.config(), tmp_path)
    assert_same_run(tmp_path, weights, straight)


def test_another_layout_goes_on_within_rounding(tiny, tmp_path):
    config = tiny.config("train.precision=fp64")
    whole = train("dp2", config, tmp_path / "straight")
    with pytest.raises(WorkerError):
        train("dp2", config, tmp_path / "moved", die_in("step", 3))
    weights = train("tp2sp", config, tmp_path / "moved")
    for a, b in zip(losses(tmp_path / "moved").values(), losses(tmp_path / "straight").values(), strict=True):
        assert a == pytest.approx(b, rel=1e-10)
    assert weights.keys() == whole.keys()
    for name, weight in weights.items():
        assert (weight - whole[name]).abs().max() <= 1e-10 * whole[name].abs().max(), name
    ledgers = [RunDir(tmp_path / name).ledger.read_text() for name in ("moved", "straight")]
    assert ledgers[0] == ledgers[1]


def test_stop_ends_with_a_checkpoint_and_the_next_start_goes_on(tiny, tmp_path, straight, capfd):
    train("dp2", tiny.config(), tmp_path, ask("STOP", 2))
    assert steps_saved(tmp_path) == [2, 3]
    assert not RunDir(tmp_path).is_done
    assert "stopped on request after 3 steps" in capfd.readouterr().err
    assert (tmp_path / "STOP").exists(), "launchers see by it that the run was asked to stop"
    weights = train("dp2", tiny.config(), tmp_path)
    assert not (tmp_path / "STOP").exists()
    assert_same_run(tmp_path, weights, straight)


def test_a_request_to_stop_before_the_first_step_saves_nothing(tiny, tmp_path):
    def hook(training, phase, finished):
        raise AssertionError("no step should begin")

    class Asked(HookedTraining):
        def _beat(self, step, phase):
            super()._beat(step, phase)
            if phase == "load":
                (self.run_dir.path / "STOP").touch()

    on_ranks("dp2", tiny.config(), run_as, Asked, tmp_path, hook)
    assert steps_saved(tmp_path) == []


def test_save_saves_and_goes_on(tiny, tmp_path, straight):
    config = tiny.config("train.keep_checkpoints=9")
    weights = train("dp2", config, tmp_path, ask("SAVE", 2))
    assert steps_saved(tmp_path) == [2, 3, 4, 6]
    assert not (tmp_path / "SAVE").exists()
    assert_same_run(tmp_path, weights, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(tiny, tmp_path, number):
    def hook(training, phase, finished):
        if (phase, finished, training.runtime.groups.rank) == ("step", 2, 1):
            os.kill(os.getpid(), number)

    train("dp2", tiny.config(), tmp_path, hook)
    assert steps_saved(tmp_path) == [2, 3]
    assert not RunDir(tmp_path).is_done


def test_a_stop_in_a_validation_leaves_no_partial_loss(tiny, tmp_path):
    def hook(training, phase, finished):
        if phase == "eval":
            (training.run_dir.path / "STOP").touch()

    train("dp2", tiny.config("train.valid_every_steps=1", "train.valid_steps=3"), tmp_path, hook)
    assert not RunDir(tmp_path).validation.exists()
    assert steps_saved(tmp_path) == [1]


def test_validation_repeats_the_same_samples_and_survives_a_restart(tiny, tmp_path):
    config = tiny.config("train.valid_every_steps=2", "optimizer.lr=1e-12")
    with pytest.raises(WorkerError):
        train("dp2", config, tmp_path, die_in("save", 4))
    train("dp2", config, tmp_path)
    lines = read_lines(RunDir(tmp_path).validation)
    assert [line["step"] for line in lines] == [1, 3, 5]
    # Nothing is learnt at this learning rate, so the loss stays the same only where the samples do.
    assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)


def test_a_complete_run_says_so_and_does_nothing(tiny, straight, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(dump_config(tiny.config()))
    before = {path: path.stat().st_mtime_ns for path in straight[0].rglob("*")}
    command = [sys.executable, "-m", "megatron_keye.train.cli", "train", str(settings), "--run-dir", str(straight[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert "is complete; choose another --run-dir" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in straight[0].rglob("*")} == before


def poisoned_steps(steps):
    """A hook that makes a gradient of rank 1 not a number in each of `steps`."""
    handles = []

    def hook(training, phase, finished):
        if phase == "step" and training.runtime.groups.rank == 1:
            while handles:
                handles.pop().remove()
            if finished in steps:
                weight = next(training.model.chunks[0].parameters())
                handles.append(weight.register_hook(lambda gradient: gradient * math.nan))

    return hook


def test_a_gradient_that_is_not_finite_is_skipped_on_all_ranks(tiny, tmp_path, straight, capfd):
    train("dp2", tiny.config(), tmp_path, poisoned_steps({2}))
    metrics, ledger = read_lines(RunDir(tmp_path).metrics), steps_of(tmp_path)
    assert [line["updated"] for line in metrics] == [line.updated for line in ledger] == [True, True, False, True, True, True]
    assert metrics[2]["grad_norm"] is None
    assert "step 3: the gradient is not finite, so no weight was changed" in capfd.readouterr().err
    before = losses(straight[0])
    now = losses(tmp_path)
    assert [now[step] for step in (0, 1, 2)] == [before[step] for step in (0, 1, 2)]
    assert math.isfinite(now[3]) and now[3] != before[3]
    digests = [[line.digest for line in steps_of(path)] for path in (tmp_path, straight[0])]
    assert digests[0] == digests[1]


def test_too_many_such_steps_end_the_run(tiny, tmp_path):
    config = tiny.config("train.max_nonfinite_steps=1")
    first, second = on_ranks("dp2", config, run_as, HookedTraining, tmp_path, poisoned_steps({1, 3, 4}))
    assert first[:2] == ("NumericError", 66)
    assert "2 steps had gradients that were not finite, and train.max_nonfinite_steps is 1; lower optimizer.lr" in first[2]
    assert second[:2] == ("PeerError", 66)
    assert steps_saved(tmp_path) == [2]
    assert not RunDir(tmp_path).is_done


def without_last_line(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def test_a_ledger_that_does_not_lead_to_the_checkpoint_is_refused_and_kept(tiny, tmp_path, straight):
    path = tmp_path / "run"
    shutil.copytree(straight[0], path)
    (path / "DONE").unlink()
    without_last_line(RunDir(path).ledger)
    before = RunDir(path).ledger.read_bytes()
    first, second = on_ranks("dp2", tiny.config("train.steps=9"), run_as, HookedTraining, path, no_hook)
    assert first[:2] == ("LedgerError", 65)
    assert "does not lead to the checkpoint after 6 steps: lines were lost or changed. Restore it, or move it away" in first[2]
    assert second[:2] == ("PeerError", 65)
    assert RunDir(path).ledger.read_bytes() == before


def test_a_checkpoint_is_not_made_before_its_ledger_is_on_disk(tiny, tmp_path):
    def hook(training, phase, finished):
        if phase == "save" and training.history.ledger is not None:
            training.history.ledger.flush = full

    def full():
        raise LedgerError("no space left")

    first, second = on_ranks("dp2", tiny.config(), run_as, HookedTraining, tmp_path, hook)
    assert first == ("LedgerError", 65, "no space left")
    assert second[:2] == ("PeerError", 65)
    assert steps_saved(tmp_path) == []


def test_a_run_that_goes_on_in_another_directory_is_proved_with_both(tiny, tmp_path, straight, capfd):
    path = tmp_path / "run"
    shutil.copytree(RunDir(straight[0]).checkpoints, RunDir(path).checkpoints)
    train("dp2", tiny.config("train.steps=8"), path)
    assert "no ledger of the first 6 steps is here: a new one begins" in capfd.readouterr().err
    proof = prove([run_files(straight[0]), run_files(path)])
    assert (proof.steps, proof.num_samples, proof.epochs, proof.segments) == (8, 32, 2, 2)
    with pytest.raises(LedgerError, match=r"run/ledger\.jsonl begins at step 6, expected step 0: name the run before it first"):
        prove([run_files(path)])


def test_another_seed_cannot_go_on(tiny, tmp_path, straight):
    shutil.copytree(straight[0], tmp_path / "run")
    first, second = on_ranks("dp2", tiny.config("train.seed=5", "train.steps=9"), run_as, HookedTraining, tmp_path / "run", no_hook)
    assert first[:2] == ("CheckpointError", 65)
    assert "seed is 5, but was 0: set train.seed back" in first[2]
    assert second[:2] == ("PeerError", 65)


def test_another_batch_and_lookahead_go_on_and_use_every_sample_once(tiny, tmp_path, straight):
    """Six steps of 4 are one epoch of the 24 samples; then come a window of two steps of 8, and one of 8."""
    shutil.copytree(straight[0], tmp_path / "run")
    config = tiny.config("data.global_batch_samples=8", "data.lookahead.batches=2", "train.steps=9")
    assert on_ranks("dp2", config, run_as, HookedTraining, tmp_path / "run", no_hook) == [None, None]
    taken = [line.samples for line in steps_of(tmp_path / "run")]
    assert [len(samples) for samples in taken] == [4] * 6 + [8] * 3
    windows = [taken[:6], taken[6:8]]
    assert sorted(sample for samples in windows[0] for sample in samples) == list(range(24))
    assert len({sample for samples in windows[1] for sample in samples}) == 16
    proof = prove([run_files(tmp_path / "run")])
    assert (proof.steps, proof.num_samples, proof.segments) == (9, 48, 2)
    assert len(proof.open_positions) == 8, "of the window of the last step"
