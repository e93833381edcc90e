"""What launch/status.sh says of a run, without SLURM."""

import json

import pytest

from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.supervise import status
from megatron_keye.train.supervise.decide import Action, Ending
from megatron_keye.train.supervise.journal import Attempt, Journal
from megatron_keye.train.supervise.slurm import QueuedJob


@pytest.fixture
def queue(monkeypatch) -> dict[str, QueuedJob]:
    """The user's jobs, which the test sets."""
    jobs: dict[str, QueuedJob] = {}
    monkeypatch.setattr(status.slurm, "my_jobs", lambda: jobs)
    monkeypatch.setenv("COLUMNS", "200")
    return jobs


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    run_dir = RunDir(tmp_path / "8b")
    run_dir.create()
    lines = [json.dumps({"step": step, "loss": 2.5, "tokens_per_s": 1234.0}) for step in range(41)]
    run_dir.metrics.write_text("\n".join([*lines, '{"step": 41, "lo']))
    journal = Journal(run_dir.path)
    journal.began(Attempt(1, "7", ("n1",), 1.0, 0))
    journal.ended(1, 2.0, Ending("hang", 0, 20, 31), Action("restart", "again"))
    return run_dir


def test_a_run_that_waits(queue, run_dir, capsys):
    queue[str(run_dir.path)] = QueuedJob("7", "pending: Resources")
    assert status.main([]) == 0
    out = capsys.readouterr().out
    for word in ("8b", "7", "pending: Resources", "41", "2.5000", "1,234", "hang"):
        assert word in out


def test_a_run_without_a_job(queue, run_dir, capsys):
    assert status.main([str(run_dir.path)]) == 0
    assert "no job" in capsys.readouterr().out
    run_dir.mark_done(41)
    assert status.main([str(run_dir.path)]) == 0
    assert "complete" in capsys.readouterr().out


def test_nothing_to_show(queue, tmp_path, capsys):
    assert status.main([]) == 0
    assert "no run of yours is in the queue" in capsys.readouterr().out
    assert status.main([str(tmp_path / "nowhere")]) == 65
    assert "expected a run directory" in capsys.readouterr().err
