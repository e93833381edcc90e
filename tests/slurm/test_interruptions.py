"""A run that is told to end, by people and by SLURM, against one that was left alone."""

import os
import re
import signal
from contextlib import suppress

import pytest

from tests.slurm.conftest import Drill

pytestmark = pytest.mark.slurm


def test_a_run_that_nothing_happens_to(drill: Drill, undisturbed):
    job = drill.submit()
    drill.wait_for_step(1)
    assert f"is already in job {job}" in drill.launch()
    assert re.search(rf"run .* {job} .* running ", drill.run_script("status.sh", drill.run_dir.path))
    drill.wait_for_end_of(job)
    assert drill.cluster.job(job, "ExitCode") == "0:0"
    assert drill.causes() == ["done"]
    drill.assert_like(undisturbed)
    assert "is complete" in drill.launch()
    kept = ("config.yaml", "job.json", "revision", "changes.diff", *(f"attempts/0001/{name}" for name in ("hosts", "environment")))
    assert all((drill.run_dir.path / name).exists() for name in kept)
    logs = drill.run_dir.path.glob("attempts/0001/ranks/*/*/attempt_0/0/stderr.log")
    assert sorted(log.parents[3].name for log in logs) == ["gpu1", "gpu2"], "a log of each rank"


def test_scancel_saves_and_the_same_command_goes_on(drill: Drill, undisturbed):
    job = drill.submit()
    drill.wait_for_step(30)
    drill.cluster.run("scancel", job)
    drill.wait_until(lambda: drill.causes() == ["cancelled"], "the end of the attempt")
    (ending,) = drill.endings()
    assert ending.saved_step == ending.last_step >= 30, "it saved where it was"
    drill.wait_for_end_of(job)
    drill.submit()
    drill.wait_until_done()
    drill.assert_like(undisturbed)


def test_the_signal_before_the_time_limit_twice(drill: Drill, undisturbed):
    """SLURM sends the batch shell alone this signal; the job puts itself into the queue again."""
    job = drill.submit()
    for step in (20, 60):
        drill.wait_for_step(step)
        drill.cluster.run("scancel", "--batch", "--signal=USR1", job)
        drill.wait_until(lambda step=step: drill.causes() == ["time_limit"] * (1 + (step == 60)), "the end of the attempt")
    drill.wait_for_end_of(job)
    assert drill.cluster.job(job, "Restarts") == "2"
    assert drill.causes() == ["time_limit", "time_limit", "done"]
    assert all(ending.saved_step == ending.last_step for ending in drill.endings())
    drill.assert_like(undisturbed)


@pytest.mark.slow
def test_the_time_limit_itself_twice(drill: Drill):
    """SLURM's own clock, which knows minutes: no step is lost between the starts of one job."""
    job = drill.submit("--time", "2", "--lead-s", "60", "--set", "train.steps=100000")
    drill.wait_until(lambda: len(drill.causes()) == 2, "two time limits", limit_s=360)
    drill.cluster.run("scancel", job)
    first, second = drill.endings()[:2]
    assert (first.cause, second.cause) == ("time_limit", "time_limit")
    assert 0 < first.saved_step == first.last_step == second.first_step
    assert second.first_step < second.saved_step == second.last_step
    assert drill.cluster.job(job, "Restarts") >= "1"


def test_requeue(drill: Drill, undisturbed):
    job = drill.submit()
    drill.wait_for_step(30)
    drill.cluster.run("scontrol", "requeue", job)
    drill.wait_for_end_of(job)
    assert drill.causes() == ["requeued", "done"]
    drill.assert_like(undisturbed)


@pytest.mark.slow
def test_preemption_that_cancels(drill: Drill, undisturbed):
    """PreemptMode=CANCEL without GraceTime: SLURM ends the job as `scancel` does, and does not start it again."""
    job = drill.submit()
    drill.wait_for_step(30)
    drill.cluster.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "true")
    drill.wait_until(lambda: drill.causes() == ["cancelled"], "the end of the attempt")
    (ending,) = drill.endings()
    assert ending.saved_step == ending.last_step >= 30, "it saved where it was"
    drill.wait_for_end_of(job)
    assert drill.cluster.job(job, "JobState") == "PREEMPTED"
    drill.submit()
    drill.wait_until_done()
    drill.assert_like(undisturbed)


@pytest.mark.slow
def test_everything_is_killed_without_warning(drill: Drill, undisturbed):
    """The supervisor first: nobody is left to save or to requeue, and the same command goes on from the last save."""
    job = drill.submit()
    drill.wait_for_step(30)
    for program in ("megatron_keye.train.supervise", "megatron_keye.train.cli train"):
        for pid in [pid for node in drill.cluster.gpu_nodes for pid in drill.cluster.processes(node, program)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    drill.wait_for_end_of(job)
    assert drill.cluster.job(job, "JobState") == "FAILED"
    assert drill.causes() == []
    drill.submit()
    drill.wait_until(lambda: drill.causes() == ["vanished", "done"], "the end")
    drill.assert_little_lost()
    drill.assert_like(undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(drill: Drill, undisturbed, rank):
    job = drill.submit()
    drill.wait_for_step(30)
    (worker,) = drill.ranks_on(f"gpu{rank + 1}")
    os.kill(worker, signal.SIGKILL)
    drill.wait_for_end_of(job)
    assert drill.causes() == ["crash", "done"]
    assert drill.endings()[0].culprit == f"gpu{rank + 1}"
    drill.assert_little_lost()
    drill.assert_like(undisturbed)
