"""What a supervisor does with SLURM at the end of a job, without SLURM."""

from dataclasses import replace

import pytest

from megatron_keye.errors import KeyeError
from megatron_keye.train.supervise import slurm, supervisor
from megatron_keye.train.supervise.attempt import Allocation
from megatron_keye.train.supervise.decide import GIVEN_UP, Action, Ending, Policy
from megatron_keye.train.supervise.journal import Attempt, Journal
from megatron_keye.train.supervise.supervisor import Supervisor
from tests.unit.train.supervise.test_slurm import JOB

REFUSED = "sbatch: error: Batch job submission failed: Requested node configuration is not available"
AWAY = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def started(tmp_path) -> Supervisor:
    job = replace(JOB, run_dir=str(tmp_path), policy=Policy(node_counts=(2,)), preflight="off")
    return Supervisor(Allocation(job, "7", 0, ("n1", "n2"), float("inf")))


@pytest.mark.parametrize(("said", "asked"), [(REFUSED, 1), (AWAY, 5)])
def test_nodes_that_cannot_be_left_out_are_used_again(started, monkeypatch, said, asked):
    """At once, where sbatch says that there are too few others: the job's time may be over in minutes."""
    calls = []

    def submit(job, exclude):
        calls.append(f"submit without {', '.join(exclude)}")
        raise KeyeError(said)

    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "requeue", lambda job: calls.append(f"requeue {job}"))
    monkeypatch.setattr(supervisor.time, "sleep", lambda _: None)
    assert started._leave(Action("resubmit", "", exclude=("n1",)), supervisor.Result(Ending("bad_node", 0, 0, 0))) == 0
    assert calls == ["submit without n1"] * asked + ["requeue 7"]


def test_a_job_whose_host_goes_down_each_time_is_given_up_when_it_starts(started, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervisor.signal, "signal", lambda *_: None)
    journal = Journal(tmp_path)
    journal.submitted("7")
    for number in range(1, Policy(node_counts=()).max_starts_without_progress + 1):
        journal.began(Attempt(number, "7", ("n1", "n2"), 0.0, 0))
        if number > 1:
            journal.ended(number - 1, 1.0, Ending("vanished", 0, 0, 3), Action("requeue", ""))
    assert started.run() == GIVEN_UP
    assert "10 attempts in a row saved nothing after step 0; the last ended by vanished" in (tmp_path / "failure.json").read_text()
    assert "diagnosis in" in capfd.readouterr().out
