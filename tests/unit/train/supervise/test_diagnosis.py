"""What a person finds who looks into a run that was given up."""

import json

import pytest

from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.supervise.attempt import Result
from megatron_keye.train.supervise.decide import Action, Ending, Failure
from megatron_keye.train.supervise.diagnosis import write_diagnosis
from megatron_keye.train.supervise.journal import Attempt, Journal

ENDING = Ending("crash", 10, 10, 12, error="ValueError: x", culprit="n2")
STOP = Action("stop", "3 attempts ended in step 12 with the same error", 93)


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    journal = Journal(tmp_path)
    journal.began(Attempt(1, "7", ("n1", "n2"), 1.0, 10))
    journal.ended(1, 2.0, ENDING, STOP)
    return run_dir


def diagnosis(run_dir: RunDir, *failures: Failure) -> dict:
    return json.loads(write_diagnosis(run_dir, Result(ENDING, failures), STOP, Journal(run_dir.path)).read_text())


def test_a_rank_that_failed(run_dir, tmp_path):
    log = tmp_path / "stderr.log"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    run_dir.note_step(12, ["a", "b"])
    found = diagnosis(run_dir, Failure(3, "n2", 1, 5.0, "ValueError: x", str(log)))
    assert (found["reason"], found["exit_code"], found["last_step"], found["error"]) == (STOP.reason, 93, 12, "ValueError: x")
    assert (found["first_failure"]["rank"], found["first_failure"]["node"]) == (3, "n2")
    assert found["samples"] == ["a", "b"]
    assert found["last_lines"][-1] == "line 99"
    assert found["attempts"] == [{"cause": "crash", "last_step": 12, "saved_step": 10, "error": "ValueError: x"}]


@pytest.mark.parametrize("step", [None, 11])
def test_samples_of_another_step_are_not_blamed(run_dir, step):
    if step is not None:
        run_dir.note_step(step, ["a"])
    assert diagnosis(run_dir)["samples"] == []


def test_without_a_rank_the_main_log_speaks(run_dir):
    (run_dir.path / "train.log").write_text("ImportError: libx.so\n")
    found = diagnosis(run_dir)
    assert found["first_failure"] is None
    assert found["last_lines"] == ["ImportError: libx.so"]
