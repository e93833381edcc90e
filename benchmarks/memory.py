"""Memory and bytes read of one node's ranks when only the replica's leader loads, as ours do, and when every rank loads for itself.

    python -m benchmarks.memory [--steps 6] [--json FILE] [--plot FILE]

The ranks of one replica, on this machine, take steps of a mixed set (texts, photographs, clips) to the point where a batch is ready
for the model. "Leader" is the feed of a training run. "Every rank" is a loader with worker processes of its own in each rank, which
reads the whole replica's share and keeps its own part, as loaders that know nothing of TP and PP do. Both decode two steps ahead.

Memory is the proportional set size (PSS) of ranks and decode workers together, in the middle of the last step, above that of the ranks
before they opened the data.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.processes import family, pss_bytes
from benchmarks.shard_sets import VARIANT, config_for, kept_set
from megatron_keye.config.schema import RunConfig
from megatron_keye.data.delivery import parcels, unpack
from megatron_keye.data.loader import ReplicaLoader, patch_counts
from megatron_keye.data.mixture import open_samples
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.data.transport import CollectiveTransport
from megatron_keye.parallel.cpu import adapt_to_cpu
from megatron_keye.parallel.groups import Groups, build_groups
from megatron_keye.parallel.launch import run_ranks
from megatron_keye.plan.cursor import Cursor
from megatron_keye.train.batch import StepBatch, fill, lay_out
from megatron_keye.train.feed import Feed, count_supervised
from megatron_keye.train.loading import Loading
from megatron_keye.train.placement import PlanAt, Planner, rank_grid

LAYOUTS = {"tp2": ("parallel.tp=2",), "tp2pp2": ("parallel.tp=2", "parallel.pp=2")}
NUM_SAMPLES = 400
DEVICE = torch.device("cpu")
LEADER, EVERY_RANK = "leader", "every rank"


@dataclass(frozen=True)
class Used:
    """By all ranks and workers of the node."""

    pss_bytes: int
    bytes_read: int


def from_leader(config: RunConfig, groups: Groups, plan_at: PlanAt, loader: ReplicaLoader | None) -> Iterator[StepBatch]:
    """A training run's own feed."""
    transport = CollectiveTransport(groups.replica, DEVICE)
    with closing(Feed(config, groups, plan_at, loader, transport, Cursor(), DEVICE)) as feed:
        while True:
            yield feed.next_step().batch


def by_every_rank(config: RunConfig, groups: Groups, plan_at: PlanAt, loader: ReplicaLoader) -> Iterator[StepBatch]:
    """The same batches, loaded by this rank for itself in a thread, as many steps ahead."""
    cursor, ahead = Cursor(), deque()
    with closing(loader), ThreadPoolExecutor(1) as background:
        while True:
            while len(ahead) <= config.data.prefetch_steps:
                plan, cursor = plan_at(cursor)
                (share,) = plan.replicas
                ahead.append((share, background.submit(loader.load, share)))
            share, loaded = ahead.popleft()
            data, rank = loaded.result(), groups.replica_rank
            own = np.concatenate([array.reshape(-1).view(np.uint8) for array in parcels(data, share, groups.grid)[rank]])
            counts = patch_counts(share, groups.grid.replica_size)
            rows, patches = unpack(torch.from_numpy(own), share, counts, groups.grid, rank)
            yield fill(lay_out(share, config, groups, DEVICE), rows, patches, count_supervised(share, data), DEVICE)


def measure_rank(config: RunConfig, way: str, steps: int) -> Used:
    """Runs on every rank; the figures are the same on all."""
    groups = build_groups(rank_grid(config, 1))
    before_bytes = _node_pss(groups)
    tokenizer = load_tokenizer(config.data.tokenizer, VARIANT)
    dataset = open_samples(config.data.train, tokenizer, VARIANT, config.data)
    plan_at = Planner(config, 1).over(dataset.plan_data, dataset.mixture(config.data, 0).order())
    loading = None
    if groups.is_leader or way == EVERY_RANK:
        loading = Loading(config, [(config.data.train, dataset)], tokenizer.specials.endoftext)
    loader = None if loading is None else loading.loader(dataset)
    batches = WAYS[way](config, groups, plan_at, loader)
    held = list(islice(batches, steps))[-1:]
    used = Used(_node_pss(groups) - before_bytes, _sum(0 if loader is None else loader.counts.bytes_read, groups))
    del held
    batches.close()
    if loading is not None:
        loading.close()
    return used


WAYS: dict[str, Callable[..., Iterator[StepBatch]]] = {LEADER: from_leader, EVERY_RANK: by_every_rank}


def _node_pss(groups: Groups) -> int:
    """Of all ranks and their workers."""
    dist.barrier()
    own = pss_bytes(family(os.getpid()))
    dist.barrier()
    return _sum(own, groups)


def _sum(value: int, groups: Groups) -> int:
    total = torch.tensor(value)
    dist.all_reduce(total, group=groups.world)
    return int(total)


def prepare() -> None:
    adapt_to_cpu(float64=False)


def compare(folder: Path, steps: int, repeats: int) -> dict[str, dict[str, list[Used]]]:
    """By layout and way, taken in turn."""
    results: dict[str, dict[str, list[Used]]] = {layout: {way: [] for way in WAYS} for layout in LAYOUTS}
    for _ in range(repeats):
        for layout, overrides in LAYOUTS.items():
            config = config_for(folder, "data.prefetch_bytes=4294967296", *overrides)
            for way in WAYS:
                world = rank_grid(config, 1).world_size
                used = run_ranks(world, partial(measure_rank, config, way, steps), prepare=prepare, timeout_s=1800.0)
                results[layout][way].append(used[0])
    return results


def report(results: dict[str, dict[str, list[Used]]]) -> Table:
    table = Table(title="ranks and workers of one node; medians")
    for column in ("layout", "who loads", "memory, MiB", "bytes read, MiB", "memory / leader", "bytes / leader"):
        table.add_column(column, justify="left" if column in ("layout", "who loads") else "right")
    for layout, ways in results.items():
        leader = ways[LEADER]
        for way, own in ways.items():
            ratios = [
                statistics.median(getattr(a, name) / getattr(b, name) for a, b in zip(own, leader, strict=True))
                for name in ("pss_bytes", "bytes_read")
            ]
            figures = [statistics.median(getattr(used, name) for used in own) / 2**20 for name in ("pss_bytes", "bytes_read")]
            table.add_row(layout, way, *(f"{figure:,.0f}" for figure in figures), *(f"{ratio:.2f}x" for ratio in ratios))
    return table


def plot(results: dict[str, dict[str, list[Used]]], path: Path) -> None:
    """Bars of memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 4))
    for number, way in enumerate(WAYS):
        heights = [statistics.median(used.pss_bytes for used in ways[way]) / 2**20 for ways in results.values()]
        axis.bar([place + 0.4 * number for place in range(len(results))], heights, 0.4, label=way)
    axis.set_xticks([place + 0.2 for place in range(len(results))], list(results))
    axis.set_ylabel("PSS of the node's ranks and workers, MiB")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="batches that every rank takes (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--sets", type=Path, help="keep the made-up set in this folder, and take it from there")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    parser.add_argument("--plot", type=Path, help="also draw them there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = kept_set(args.sets or Path(scratch), "mixed", NUM_SAMPLES)
        results = compare(folder, args.steps, args.repeats)
    Console(width=120).print(report(results))
    if args.json:
        args.json.write_text(json.dumps({k: {w: [asdict(u) for u in own] for w, own in v.items()} for k, v in results.items()}, indent=1))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
