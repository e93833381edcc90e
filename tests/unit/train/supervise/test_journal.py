"""The journal of a run's starts, what the next decision reads from it, and the time that it accounts for."""

import json

import pytest

from megatron_keye.train import cli
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.supervise.decide import Action, Ending
from megatron_keye.train.supervise.goodput import goodput, lost_steps
from megatron_keye.train.supervise.journal import Attempt, Journal

CRASH = Ending("crash", 0, 20, 27, error="ValueError: x", culprit="n1", lost_nodes=("n2",))
DONE = Ending("done", 20, 40, 40)
RESTART, FINISH = Action("restart", "again"), Action("finish", "complete")


def begun(number: int, began_s: float, first_step: int) -> Attempt:
    return Attempt(number, "7", ("n1", "n2"), began_s, first_step)


@pytest.fixture
def journal(tmp_path) -> Journal:
    """Two starts with 10 s between them."""
    journal = Journal(tmp_path)
    journal.submitted("7")
    journal.began(begun(1, 100.0, 0))
    journal.ended(1, 160.0, CRASH, RESTART)
    journal.began(begun(2, 170.0, 20))
    return journal


def test_attempts_come_back(journal):
    journal.ended(2, 200.0, DONE, FINISH)
    first, second = journal.attempts()
    assert first == Attempt(1, "7", ("n1", "n2"), 100.0, 0, 160.0, CRASH, "restart", "again")
    assert (second.ending, second.ended_s) == (DONE, 200.0)
    assert journal.endings() == [CRASH, DONE]


def test_an_attempt_that_runs_has_no_ending(journal):
    assert journal.attempts()[1].ending is None
    assert journal.endings() == [CRASH]


def test_a_person_who_submits_again_starts_a_new_account(journal):
    journal.submitted("8")
    assert journal.endings() == []
    assert len(journal.attempts()) == 2


def test_a_line_that_was_cut_off_is_passed_over(journal):
    with journal.path.open("a") as file:
        file.write('{"event": "ended", "att')
    assert len(journal.attempts()) == 2


def test_lines_after_one_that_was_cut_off_count(journal):
    with journal.path.open("a") as file:
        file.write('{"event": "ended", "att')
    journal.ended(2, 200.0, DONE, FINISH)
    assert journal.attempts()[1].ending == DONE


def test_no_journal(tmp_path):
    assert Journal(tmp_path).attempts() == []


def test_goodput_accounts_for_all_time(journal):
    """20 kept steps of 1 s in 100 s; 7 of the first start's were lost; 10 s passed between the starts."""
    journal.ended(2, 200.0, DONE, FINISH)
    shares = goodput(journal.attempts(), kept_steps=40, training_s=40.0, now_s=1e9)
    assert (shares.wall_s, shares.training_s, shares.repeated_s, shares.waiting_s, shares.other_s) == (100.0, 40.0, 7.0, 10.0, 43.0)
    assert shares.share == 0.4


def test_goodput_of_a_run_that_runs(journal):
    shares = goodput(journal.attempts(), kept_steps=0, training_s=0.0, now_s=180.0)
    assert (shares.wall_s, shares.share, shares.repeated_s) == (80.0, 0.0, 0.0)
    assert [lost_steps(attempt) for attempt in journal.attempts()] == [7, 0]


def write_metrics(run_dir: RunDir) -> None:
    lines = [json.dumps({"step": step, "step_time_s": 2.0}) for step in range(10)]
    run_dir.metrics.write_text("\n".join([*lines, '{"step": 10, "st']))


def test_report(journal, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run_dir = RunDir(journal.path.parent)
    write_metrics(run_dir)
    journal.ended(2, 200.0, DONE, FINISH)
    assert cli.main(["report", str(run_dir.path)]) == 0
    out = capsys.readouterr().out
    assert "crash: n2: ValueError: x" in out
    assert "goodput 20.0%: 0:00:20 of 0:01:40" in out
    assert "2 starts, 7 steps lost" in out


def test_report_as_json(journal, capsys):
    assert cli.main(["report", str(journal.path.parent), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [attempt["lost_steps"] for attempt in content["attempts"]] == [7, 0]


def test_report_of_something_else(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 65
    assert "expected a run that launch/train.sh submitted" in capsys.readouterr().err
