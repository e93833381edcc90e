"""Resuming, beside Megatron-Energon, Mosaic Streaming and torchdata's StatefulDataLoader: exactness when the number of data-parallel
ranks changes, size of the state, and time from a restart to the first batch.

    python -m benchmarks.resume [--samples 1000000] [--sets FOLDER] [--json FILE] [--plot FILE]

Exactness: half an epoch of 6,400 samples on two ranks, the other half on one, two or four; counted is what was never or twice used.
Each loader is given the states of all old ranks and does with them what its interface offers. Energon has a tool that rewrites
states for another number of ranks between runs, with as many workers in all; it is not used here.

Time: the loader opened, its state restored and a batch read, in CPU time of its processes, at the start and near the end of an epoch
of a million small texts.

pip install -e '.[benchmarks]' brings all but Streaming, whose pinned versions exclude those of this project.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.processes import cpu_seconds, family
from benchmarks.resume_loaders import GLOBAL_BATCH, MICROBATCH, loaders, ready_set, state_bytes
from benchmarks.tiny_set import make_tiny_set
from megatron_keye.parallel.launch import run_ranks

EXACT_SAMPLES = 6_400
FIRST_WORLD, NEXT_WORLDS = 2, (1, 2, 4)
TIMEOUT_S = 3600.0


def samples_of_rank(name: str, folder: Path, states: Sequence[Any], num_samples: int) -> tuple[list[int], Any]:
    """Runs on every rank: its next samples, fewer where an epoch ends before, and the state after them."""
    loader = loaders()[name](folder, dist.get_rank(), dist.get_world_size(), states)
    batches, numbers = iter(loader), []
    while len(numbers) < num_samples and (batch := next(batches, None)) is not None:
        numbers += batch
    return numbers, loader.state()


def run_world(name: str, folder: Path, world: int, states: Sequence[Any], num_samples: int) -> tuple[list[int], list[Any]]:
    """Samples and states of all ranks, which take `num_samples` together."""
    results = run_ranks(world, partial(samples_of_rank, name, folder, states, num_samples // world), prepare=nothing, timeout_s=TIMEOUT_S)
    return [number for numbers, _ in results for number in numbers], [state for _, state in results]


def nothing() -> None:
    pass


def exactness(name: str, folder: Path) -> dict[str, Any]:
    """Samples never used and used again, by the number of ranks of the second half."""
    half = EXACT_SAMPLES // 2
    first, states = run_world(name, folder, FIRST_WORLD, [], half)
    found: dict[str, Any] = {"state_bytes": max(map(state_bytes, states))}
    for world in NEXT_WORLDS:
        try:
            second, _ = run_world(name, folder, world, states, half)
        except RuntimeError as error:
            found[f"to_{world}"] = {"refused": str(error).strip().splitlines()[-1]}
            continue
        uses = Counter(first + second)
        found[f"to_{world}"] = {"never": EXACT_SAMPLES - len(uses), "again": uses.total() - len(uses)}
    return found


def state_near_end(name: str, folder: Path, num_samples: int) -> Any:
    """Runs on one rank: the state one batch before the end; loaders without a formula for it go there sample by sample."""
    position = num_samples // GLOBAL_BATCH * GLOBAL_BATCH - GLOBAL_BATCH
    loader = loaders()[name](folder, 0, 1, [])
    batches = iter(loader)
    next(batches)
    if hasattr(loader, "state_at"):
        return loader.state_at(position)
    while (position := position - MICROBATCH) > 0:
        next(batches)
    return loader.state()


def first_batch(name: str, folder: Path, states: Sequence[Any]) -> tuple[float, float]:
    """Runs on one rank: seconds until a fresh loader has given a batch, of CPU time with its workers' and by the clock."""
    began_s = time.perf_counter()
    began_cpu_s = cpu_seconds(family(os.getpid()))
    batches = iter(loaders()[name](folder, 0, 1, states))
    next(batches)
    return cpu_seconds(family(os.getpid())) - began_cpu_s, time.perf_counter() - began_s


def on_one_rank(function: partial) -> Any:
    return run_ranks(1, function, prepare=nothing, timeout_s=TIMEOUT_S)[0]


def restart_times(folder: Path, num_samples: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Times of every loader at both ends, taken in turn."""
    ends = {name: on_one_rank(partial(state_near_end, name, folder, num_samples)) for name in loaders()}
    found: dict[str, dict[str, Any]] = {name: {"end_state_bytes": state_bytes(state)} for name, state in ends.items()}
    for _ in range(repeats):
        for name, state in ends.items():
            for where, states in (("start", []), ("end", [state])):
                cpu_s, wall_s = on_one_rank(partial(first_batch, name, folder, states))
                found[name].setdefault(f"{where}_s", []).append(cpu_s)
                found[name].setdefault(f"{where}_wall_s", []).append(wall_s)
    return found


def report(exact: dict, times: dict, num_samples: int) -> Table:
    title = (
        f"never used / used again of {EXACT_SAMPLES:,} after 2 ranks became 1, 2, 4; CPU time to a batch of {num_samples:,} samples, median"
    )
    table = Table(title=title)
    for column in ("loader", "2 to 1", "2 to 2", "2 to 4", "state, bytes a rank", "at the start, s", "at the end, s", "end / start"):
        table.add_column(column)
    for name, found in exact.items():
        outcomes = [_outcome(found[f"to_{world}"]) for world in NEXT_WORLDS]
        start_s, end_s = (statistics.median(times[name][key]) for key in ("start_s", "end_s"))
        ratio = end_s / max(start_s, 0.01)
        table.add_row(name, *outcomes, f"{found['state_bytes']:,}", f"{start_s:.3f}", f"{end_s:.3f}", f"{ratio:.2f}")
    return table


def _outcome(found: dict) -> str:
    return f"refused: {found['refused']:.40}" if "refused" in found else f"{found['never']} / {found['again']}"


def plot(times: dict, path: Path) -> None:
    """Bars of the time to the first batch at both ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for number, key in enumerate(("start_s", "end_s")):
        heights = [statistics.median(found[key]) for found in times.values()]
        axis.bar([place + 0.4 * number for place in range(len(times))], heights, 0.4, label=key.removesuffix("_s"))
    axis.set_xticks([place + 0.2 for place in range(len(times))], list(times))
    axis.set_ylabel("CPU seconds to the first batch")
    axis.set_yscale("log")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the set for times (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="restarts of each kind (default %(default)s)")
    parser.add_argument("--sets", type=Path, help="keep the made-up sets in this folder, and take them from there")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    parser.add_argument("--plot", type=Path, help="also draw the times there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        small, large = (ready(args.sets or Path(scratch), count) for count in (EXACT_SAMPLES, args.samples))
        exact = {name: exactness(name, small) for name in loaders()}
        times = restart_times(large, args.samples, args.repeats)
    Console(width=150).print(report(exact, times, args.samples))
    if args.json:
        args.json.write_text(json.dumps({"exact": exact, "times": times}, indent=1))
    if args.plot:
        plot(times, args.plot)


def ready(sets: Path, num_samples: int) -> Path:
    """The folder of a set of tiny texts, with what every loader wants."""
    folder = sets / str(num_samples)
    if not folder.exists():
        folder.mkdir(parents=True)
        make_tiny_set(folder, num_samples)
    for name in loaders():
        ready_set(folder, name, num_samples)
    return folder


if __name__ == "__main__":
    main()
