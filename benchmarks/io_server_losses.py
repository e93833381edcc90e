"""What losing servers costs a run on clips: of two servers, one is killed, both are, or one is late by 2 s.

Loss and ledger of each run must be those of the run that decodes by itself. The run has one core and both servers another:

    python -m benchmarks.io_server_losses --steps 15
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.io_server_steps import NUM_SAMPLES, WARM_UP_STEPS, server, steps_of, train
from benchmarks.shard_sets import kept_set
from benchmarks.slow_path import SlowPath

LATE_S = 2.0


@dataclass(frozen=True)
class Case:
    name: str
    servers: int = 2
    killed: int = 0
    """Servers that get SIGKILL when a third of the steps is done."""
    late: int = 0


CASES = (
    Case("no servers", servers=0),
    Case("two servers"),
    Case("one killed", killed=1),
    Case("both killed", killed=2),
    Case("one late", late=1),
)


def run(case: Case, folder: Path, run_dir: Path, steps: int) -> list[dict]:
    """What the run wrote about each step. Ends this program where the run failed."""
    with ExitStack() as stack:
        started = [stack.enter_context(server(folder / "shards")) for _ in range(case.servers)]
        urls = [SlowPath(url, LATE_S).url if number < case.late else url for number, (url, _) in enumerate(started)]
        running = train(folder, run_dir, steps, urls)
        wait_for(steps // 3, running, run_dir)
        for _, process in started[: case.killed]:
            process.kill()
        if code := running.wait():
            raise SystemExit(f"{case.name}: the run ended with code {code}")
    return steps_of(run_dir)


def wait_for(steps: int, running: subprocess.Popen, run_dir: Path) -> None:
    while running.poll() is None and len(steps_of(run_dir)) < steps:
        time.sleep(0.05)


def summary(lines: list[dict]) -> str:
    steps_s, waits_s = ([line[name] for line in lines[WARM_UP_STEPS:]] for name in ("step_time_s", "data_wait_s"))
    media = ", ".join(f"{sum(line[f'media_{name}'] for line in lines)} {name}" for name in ("remote", "local", "failed", "hedged"))
    times = f"step {statistics.median(steps_s):.2f} s, data wait {statistics.median(waits_s):.2f} s, largest {max(waits_s):.2f} s"
    return f"{len(lines)} steps, {times}; media: {media}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--sets", type=Path, help="keep the made-up set in this folder, and take it from there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        folder = kept_set(args.sets or Path(runs), "video", NUM_SAMPLES)
        results = set()
        for number, case in enumerate(CASES):
            lines = run(case, folder, run_dir := Path(runs) / f"run{number}", args.steps)
            results.add((tuple(line["loss"] for line in lines), (run_dir / "ledger.jsonl").read_text()))
            print(f"{case.name}: {summary(lines)}", flush=True)
    print("loss and ledger are the same in all" if len(results) == 1 else f"loss or ledger differ: {len(results)} different runs")


if __name__ == "__main__":
    main()
