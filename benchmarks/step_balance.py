"""Step time of a long-tailed mix on two data-parallel processes under three plans of the same samples: ours, round robin, and rows
filled as samples arrive.

    python -m benchmarks.step_balance [--batches 6] [--repeats 2] [--json FILE] [--plot FILE]

One world, one model, the real training step. Every batch is run under each plan in turn. All three compute the same loss, which is
checked. Round robin deals samples out and packs each replica's rows as ours does; "on arrival" fills rows until the next sample does
not fit and deals rows out. A step lasts as long as its slowest rank: on a busy machine CPU time of the slowest rank is the steadier
figure, and wall time stands beside it.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_keye.config.load import load_config
from megatron_keye.config.schema import RunConfig
from megatron_keye.contract.media import PatchGrid, SampleShape, Segment
from megatron_keye.parallel.cpu import adapt_to_cpu
from megatron_keye.parallel.groups import build_groups, prepare_megatron
from megatron_keye.parallel.launch import run_ranks
from megatron_keye.plan.assignment import Assignment, StepCosts, assign_samples, rows_needed
from megatron_keye.plan.step import PlanSettings, assignment_rules, replica_plans
from megatron_keye.plan.table import SampleTable
from megatron_keye.plan.types import Replicas
from megatron_keye.train.build import build_model, build_optimizer
from megatron_keye.train.placement import plan_settings, rank_grid
from megatron_keye.train.step import TrainStep
from megatron_keye.train.synthetic import synthetic_batch

RANKS = 2
SEQ_LENGTH_TOKENS = 1024
OVERRIDES = (f"data.seq_length_tokens={SEQ_LENGTH_TOKENS}", "train.precision=fp32")
OURS = "ours"


def ours(costs: StepCosts, settings: PlanSettings) -> Assignment:
    return assign_samples(costs, assignment_rules(settings))


def round_robin(costs: StepCosts, settings: PlanSettings) -> Assignment:
    replica = np.arange(len(costs.tokens)) % settings.num_replicas
    needed = rows_needed(costs.tokens, replica, settings.num_replicas, settings.seq_length_tokens)
    return Assignment(replica, None, int(needed.max()))


def on_arrival(costs: StepCosts, settings: PlanSettings) -> Assignment:
    row, used = np.zeros(len(costs.tokens), np.int64), 0
    for slot, tokens in enumerate(costs.tokens.tolist()):
        row[slot] = row[slot - 1] if slot else 0
        if used + tokens > settings.seq_length_tokens:
            row[slot], used = row[slot] + 1, 0
        used += tokens
    return Assignment(row % settings.num_replicas, row // settings.num_replicas, int(row[-1]) // settings.num_replicas + 1)


PLANS: dict[str, Callable[[StepCosts, PlanSettings], Assignment]] = {OURS: ours, "round robin": round_robin, "on arrival": on_arrival}


def draw(count: int, rng: np.random.Generator) -> list[SampleShape]:
    """45 % text, 40 % one image, 10 % several, 5 % clips; all lengths log-normal and cut at a row."""
    return [_sample(kind, rng) for kind in rng.choice(4, count, p=(0.45, 0.40, 0.10, 0.05))]


def _sample(kind: int, rng: np.random.Generator) -> SampleShape:
    if kind == 0:
        return SampleShape(_length(rng, 90, 1.2, 8, SEQ_LENGTH_TOKENS))
    if kind == 3:
        segments = [_segment(int(rng.integers(16, 37)), gap_tokens=4)] * int(rng.integers(4, 24))
    else:
        number = 1 if kind == 1 else int(rng.integers(2, 6))
        segments = [_segment(_length(rng, 120, 0.9, 16, 900 // number), gap_tokens=10) for _ in range(number)]
    return SampleShape(sum(s.grid.num_tokens + s.gap_tokens for s in segments) + 20, tuple(segments))


def _length(rng: np.random.Generator, median: float, sigma: float, least: int, most: int) -> int:
    return int(np.clip(rng.lognormal(np.log(median), sigma), least, most))


def _segment(num_tokens: int, gap_tokens: int) -> Segment:
    """About `num_tokens`, and not more."""
    rows = int(num_tokens**0.5)
    return Segment(PatchGrid(1, 2 * rows, 2 * (num_tokens // rows)), gap_tokens)


def place(plan: str, shapes: Sequence[SampleShape], settings: PlanSettings) -> Replicas:
    members = np.arange(len(shapes))
    costs = SampleTable.of(shapes).step_costs(members, settings.cost, settings.pad_multiple_tokens, settings.seq_length_tokens)
    return replica_plans(members.tolist(), shapes, PLANS[plan](costs, settings), settings)


def prepare() -> None:
    adapt_to_cpu(float64=False)


def measure_rank(config: RunConfig, batches: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Runs on every rank: figures of each batch under each plan."""
    os.sched_setaffinity(0, {dist.get_rank() % os.cpu_count()})
    device = torch.device("cpu")
    groups = build_groups(rank_grid(config, RANKS))
    prepare_megatron(groups, 0)
    model = build_model(config, groups, device)
    step = TrainStep(model, build_optimizer(model))
    settings, rng = plan_settings(config, RANKS), np.random.default_rng(0)
    results: dict[str, list[dict[str, float]]] = {plan: [] for plan in PLANS}
    for number in range(batches + 1):
        shapes = draw(config.data.global_batch_samples, rng)
        prepared = {plan: synthetic_batch(number, place(plan, shapes, settings), config, groups, device) for plan in PLANS}
        for _ in range(repeats if number else 1):  # the first batch warms up
            for plan, batch in prepared.items():
                dist.barrier()
                began_s, began_cpu_s = time.perf_counter(), time.process_time()
                loss = step.accumulate(batch)
                cpu_s = time.process_time() - began_cpu_s
                dist.barrier()
                if number:
                    results[plan].append({"wall_s": time.perf_counter() - began_s, "cpu_s": cpu_s, "loss": loss})
    return results


def compare(config: RunConfig, batches: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """The slowest rank's figures of every step. Raises AssertionError where plans give different losses."""
    ranks = run_ranks(RANKS, partial(measure_rank, config, batches, repeats), prepare=prepare, timeout_s=3600.0)
    slowest = {
        plan: [{key: max(step[key] for step in steps) for key in steps[0]} for steps in zip(*(rank[plan] for rank in ranks), strict=True)]
        for plan in PLANS
    }
    for steps in zip(*slowest.values(), strict=True):
        losses = [step["loss"] for step in steps]
        assert max(losses) - min(losses) < 1e-4 * max(losses), f"plans of the same samples gave losses {losses}"
    return slowest


def ratios(steps: dict[str, list[dict[str, float]]], plan: str, key: str) -> list[float]:
    """Of every step to ours."""
    return [other[key] / own[key] for own, other in zip(steps[OURS], steps[plan], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--samples", type=int, default=32, help="of a batch (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each plan with each batch (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    parser.add_argument("--plot", type=Path, help="also draw the ratios there")
    args = parser.parse_args()
    config = load_config("debug", (*OVERRIDES, f"data.global_batch_samples={args.samples}"))
    steps = compare(config, args.batches, args.repeats)
    table = Table(title=f"a step of {args.samples} samples on {RANKS} processes, relative to ours: median (largest)")
    for column in ("plan", "CPU time of the slowest rank", "wall time", "median, s"):
        table.add_column(column)
    for plan in PLANS:
        cells = [f"{statistics.median(own):.2f} ({max(own):.2f})" for own in (ratios(steps, plan, "cpu_s"), ratios(steps, plan, "wall_s"))]
        table.add_row(plan, *cells, f"{statistics.median(step['wall_s'] for step in steps[plan]):.2f}")
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(json.dumps(steps, indent=1))
    if args.plot:
        plot(steps, args.plot)


def plot(steps: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Each step's CPU time of the slowest rank, relative to ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    axis.boxplot([ratios(steps, plan, "cpu_s") for plan in PLANS], tick_labels=list(PLANS))
    axis.set_ylabel("step, CPU time of the slowest rank, ours is 1")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
