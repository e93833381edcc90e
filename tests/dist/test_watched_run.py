"""A run that hangs or fails in a step leaves behind where it was and what it trained on."""

import json
import time

import pytest

from megatron_keye.parallel.launch import WorkerError
from megatron_keye.train.run_dir import RunDir
from tests.tiny import train


def hang_on_rank_1(training, phase, step):
    if (phase, step, training.runtime.groups.rank) == ("step", 3, 1):
        time.sleep(600)


def test_a_rank_that_hangs_ends_the_run_and_shows_where(tiny, tmp_path):
    """Rank 1 sleeps; rank 0 waits for it in a collective. Both end by themselves."""
    config = tiny.config("train.hang_timeout_s=3")
    began_s = time.monotonic()
    with pytest.raises(WorkerError):
        train("dp2", config, tmp_path / "run", hang_on_rank_1)
    assert time.monotonic() - began_s < 60
    run_dir = RunDir(tmp_path / "run")
    asleep, waiting = (run_dir.stacks(rank).read_text() for rank in (1, 0))
    assert "in hang_on_rank_1" in asleep
    assert waiting.startswith("Timeout")
    assert "in next_step" in waiting or "in poll" in waiting


def fail_in_step_3(training, phase, step):
    if (phase, step) == ("step", 3):
        training.step.run = lambda *_: 1 / 0


def test_a_step_that_fails_is_known_by_its_samples(tiny, tmp_path):
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        train("one", tiny.config(), tmp_path / "failing", fail_in_step_3)
    train("one", tiny.config(), tmp_path / "straight")
    noted = json.loads(RunDir(tmp_path / "failing").step.read_text())
    assert noted["step"] == 3
    lines = [json.loads(line) for line in RunDir(tmp_path / "straight").ledger.read_text().splitlines()]
    assert [noted["samples"]] == [line["ids"] for line in lines if line.get("step") == 3]
