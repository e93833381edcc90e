"""`keye report`: every start of a run on SLURM, why it ended, and how much of the time trained."""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_keye.errors import SettingsError
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.supervise.diagnosis import FILE as DIAGNOSIS
from megatron_keye.train.supervise.goodput import Goodput, goodput, lost_steps
from megatron_keye.train.supervise.journal import Attempt, Journal

HELP = """Show every start of a run that launch/train.sh submitted: nodes, steps, why it ended, what was lost, what was done next.
The last lines say how much of the time since the first start went into steps that are in the weights."""
EXAMPLES = """\
  keye report runs/8b
  keye report runs/8b --json | jq .goodput        # for dashboards"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> int:
    """Raises SettingsError where no job ran."""
    run_dir = RunDir(args.run_dir)
    attempts = Journal(run_dir.path).attempts()
    if not attempts:
        raise SettingsError(f"{run_dir.path} has no attempts.jsonl with a start in it; expected a run that launch/train.sh submitted")
    shares = goodput(attempts, *kept_steps(run_dir.metrics), time.time())
    if args.json:
        print(json.dumps({"goodput": shares.share, **vars(shares), "attempts": [_fields(attempt) for attempt in attempts]}))
        return 0
    console = Console()
    console.print(_table(attempts))
    console.print(_summary(attempts, shares), highlight=False)
    if (run_dir.path / DIAGNOSIS).exists():
        console.print(f"it was given up once: {run_dir.path / DIAGNOSIS} says why", highlight=False, soft_wrap=True)
    return 0


def kept_steps(metrics: Path) -> tuple[int, float]:
    """The number of steps in the metrics, and the seconds that they took in all."""
    num_steps, seconds = 0, 0.0
    for step_s in _step_times(metrics):
        num_steps += 1
        seconds += step_s
    return num_steps, seconds


def _step_times(metrics: Path) -> Iterable[float]:
    if not metrics.exists():
        return
    with metrics.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)["step_time_s"]
            except (ValueError, KeyError):
                # The line that is being written.
                continue


def _table(attempts: list[Attempt]) -> Table:
    table = Table("attempt", "job", "nodes", "began", "took", "steps", "lost", "ended by", "then")
    for attempt in attempts:
        ending = attempt.ending
        took = "" if attempt.ended_s is None else _duration(attempt.ended_s - attempt.began_s)
        began = time.strftime("%m-%d %H:%M:%S", time.localtime(attempt.began_s))
        steps = f"{attempt.first_step} to {ending.last_step}" if ending else f"{attempt.first_step} to ..."
        cause = ending.cause.replace("_", " ") if ending else "runs, or was lost with its host"
        details = [", ".join(ending.lost_nodes + ending.bad_nodes), ending.error[:60]] if ending else []
        why = ": ".join([cause, *filter(None, details)])
        row = (attempt.number, attempt.job, len(attempt.nodes), began, took, steps, lost_steps(attempt), why, attempt.action)
        table.add_row(*map(str, row))
    return table


def _summary(attempts: list[Attempt], shares: Goodput) -> str:
    parts = {"repeated steps": shares.repeated_s, "waiting": shares.waiting_s, "starting, saving and the rest": shares.other_s}
    rest = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts.items())
    lost = sum(map(lost_steps, attempts))
    trained = f"{_duration(shares.training_s)} of {_duration(shares.wall_s)} went into steps that are kept"
    return f"goodput {shares.share:.1%}: {trained}; {rest}.\n{len(attempts)} starts, {lost} steps lost and repeated."


def _fields(attempt: Attempt) -> dict:
    ending = {} if attempt.ending is None else vars(attempt.ending)
    return {**{name: value for name, value in vars(attempt).items() if name != "ending"}, **ending, "lost_steps": lost_steps(attempt)}


def _duration(seconds: float) -> str:
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest_s:02d}"
