"""launch/status.sh: the jobs of each run, how far it is, and what it waits for."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_keye.errors import KeyeError, SettingsError
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.supervise import slurm
from megatron_keye.train.supervise.evidence import saved_step, tail
from megatron_keye.train.supervise.journal import Journal

HELP = """Show how runs are doing: their job, step, loss, speed, restarts, last checkpoint, and what they wait for.
Without RUN_DIR, all runs of yours that have a job in the queue."""
EXAMPLES = """\
examples:
  launch/status.sh
  launch/status.sh /shared/runs/8b
  keye report /shared/runs/8b          # every start, and why it ended"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="launch/status.sh", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="*", type=Path)
    args = parser.parse_args(argv)
    try:
        jobs = slurm.my_jobs()
        paths = [path.absolute() for path in args.run_dirs] or [Path(run_dir) for run_dir in sorted(jobs)]
        table = Table("run", "job", "state", "step", "loss", "tokens/s", "starts", "saved", "last ending")
        for path in paths:
            table.add_row(path.name, *_row(path, jobs.get(str(path))))
    except KeyeError as error:
        print(f"launch/status.sh: error: {error}", file=sys.stderr)
        return error.exit_code
    Console().print(table if paths else "no run of yours is in the queue")
    return 0


def _row(path: Path, job: slurm.QueuedJob | None) -> tuple[str, ...]:
    """Raises SettingsError for a folder that is no run."""
    if not path.is_dir():
        raise SettingsError(f"{path} is not there; expected a run directory")
    run_dir = RunDir(path)
    attempts = Journal(path).attempts()
    step, loss, speed = _last_metrics(run_dir)
    endings = [attempt.ending.cause for attempt in attempts if attempt.ending is not None]
    state = "complete" if run_dir.is_done else "no job" if job is None else job.text
    job_id = "" if job is None else job.id
    return job_id, state, step, loss, speed, str(len(attempts)), str(saved_step(run_dir)), endings[-1] if endings else ""


def _last_metrics(run_dir: RunDir) -> tuple[str, str, str]:
    """Steps done, loss and tokens/s, as texts; empty before the first step."""
    for line in reversed(tail(run_dir.metrics, 2)):
        try:
            fields = json.loads(line)
            return str(fields["step"] + 1), f"{fields['loss']:.4f}", f"{fields['tokens_per_s']:,.0f}"
        except (ValueError, KeyError, TypeError):
            # The line that is being written, or a loss that was not a number.
            continue
    return "", "", ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
