"""Step time of a run on clips: decoding on the leader's own core, by one server, by two servers.

The run has one core and the servers another, as if they were another machine: where the leader decodes, it does so beside training. Two
servers share that core on a machine of two, so they show what a second one costs, not what it gains. Runs take turns; caches hold next
to nothing, as a real run does not ask for the same clip twice:

    python -m benchmarks.io_server_steps --steps 6 --turns 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.shard_sets import kept_set

KEYE = (sys.executable, "-m", "megatron_keye.train.cli")
NUM_SAMPLES = 100
WARM_UP_STEPS = 2
CACHE_MIB = 40
"""Room for the results of a few clips, which the server needs while it sends them."""
RUN_CORE, SERVER_CORE = "0", "1"


@contextmanager
def server(root: Path):
    """A server with one worker: its URL and its process."""
    options = ("--listen", "127.0.0.1:0", "--root", str(root), "--queue", "64", "--memory-mib", str(CACHE_MIB))
    process = subprocess.Popen(["taskset", "-c", SERVER_CORE, *KEYE, "io-server", *options], stderr=subprocess.PIPE, text=True)
    try:
        yield next(json.loads(line)["url"] for line in process.stderr if line.startswith("{")), process
    finally:
        process.terminate()
        process.communicate()


def train(folder: Path, run_dir: Path, steps: int, urls: Sequence[str]) -> subprocess.Popen:
    """Start a run of the debug model on the set in `folder`, with these servers; without any it decodes by itself."""
    overrides = [
        f"data.train={folder / 'shards'}", f"data.tokenizer={folder / 'tokenizer'}", "data.valid=null", "data.seq_length_tokens=8192",
        "data.image.max_tokens=1024", "data.video.max_frame_tokens=64", "data.video.total_tokens=256", "data.global_batch_samples=16",
        "data.loader.workers=1", f"train.steps={steps}", "train.valid_every_steps=0",
        f"data.media.servers=[{', '.join(urls)}]",
    ]  # fmt: skip
    command = ["taskset", "-c", RUN_CORE, *KEYE, "train", "debug", "--run-dir", str(run_dir), "--set", *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def steps_of(run_dir: Path) -> list[dict]:
    """What the run wrote about each step so far."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(folder: Path, run_dir: Path, steps: int, servers: int) -> dict[str, float]:
    """Median seconds of a step and of waiting for data, and how many media came from servers."""
    with ExitStack() as stack:
        urls = [stack.enter_context(server(folder / "shards"))[0] for _ in range(servers)]
        if code := train(folder, run_dir, steps, urls).wait():
            raise SystemExit(f"the run ended with code {code}")
    taken = steps_of(run_dir)[WARM_UP_STEPS:]
    return {name: statistics.median(line[name] for line in taken) for name in ("step_time_s", "data_wait_s", "media_remote")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--sets", type=Path, help="keep the made-up set in this folder, and take it from there")
    args = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {0: [], 1: [], 2: []}
    with tempfile.TemporaryDirectory() as runs:
        folder = kept_set(args.sets or Path(runs), "video", NUM_SAMPLES)
        for turn in range(args.turns):
            for servers, results in found.items():
                results.append(run(folder, Path(runs) / f"run{turn}-{servers}", args.steps, servers))
                print(servers, "servers:", ", ".join(f"{name} {value:.2f}" for name, value in results[-1].items()), flush=True)
    local_s = statistics.median(result["step_time_s"] for result in found[0])
    for servers, results in found.items():
        step_s = statistics.median(result["step_time_s"] for result in results)
        print(f"{servers} servers: step {step_s:.2f} s, {step_s / local_s:.2f} of decoding on the leader")


if __name__ == "__main__":
    main()
