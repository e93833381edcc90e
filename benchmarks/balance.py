"""How much longer than necessary a step takes under plans of ours and of others, and how long planning takes.

    python -m benchmarks.balance [--quick] [--batches 20] [--json FILE] [--plot FILE]

Figures are percent above the lower bound max(mean, largest item), means over batches with the worst batch beside ours. Three
barriers: once a step; between ViT and decoder ("phase"); after every microbatch of packed rows. Costs are those of
`mixes.py`, so this measures plans, not machines. Planning is timed in CPU time, once compiled.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.balance_methods import METHODS, Case, bound_over_mean, over_bound
from benchmarks.mixes import MIXES, Mix, draw
from megatron_keye.plan.blocks import shuffled
from megatron_keye.plan.compiled import has_numba
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.lookahead import Lookahead, divide_window

REPLICAS, SAMPLES_EACH = (8, 64, 1024), (4, 16, 64)
QUICK_REPLICAS, QUICK_SAMPLES_EACH, QUICK_BATCHES = (8, 64), (4, 16), 3
BARRIERS = ("step", "phase", "microbatch")
MEASURES = (*BARRIERS, "microbatch, rows")
SHOWN = {
    "step": ("round robin", "unsorted greedy", "Karmarkar-Karp, equal", "LPT per microbatch", "ours, step"),
    "phase": ("round robin", "Karmarkar-Karp, equal", "ours, step", "ours, phase", "ours, phase + spill"),
    "microbatch": ("packed on arrival", "LPT per microbatch", "ours, step", "ours, microbatch"),
}
LOOKAHEAD_BATCHES = (1, 2, 4, 8, 16)
ANY_COST = CostModel(1, 0, 0, 0, 0)


@dataclass
class Measured:
    """One way in one cell: time over the bound by barrier and batch, CPU ms of planning, share of visual tokens that move."""

    over_bound: dict[str, list[float]] = field(default_factory=lambda: {measure: [] for measure in MEASURES})
    plan_ms: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cells and few batches")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    replicas, each = (QUICK_REPLICAS, QUICK_SAMPLES_EACH) if options.quick else (REPLICAS, SAMPLES_EACH)
    batches = QUICK_BATCHES if options.quick else options.batches
    console = Console(width=170)
    compile_s = _warm_up(max(replicas) * max(each), max(replicas))
    console.print(f"numba: {'yes' if has_numba() else 'no'}; first plan, with compiling or loading: {compile_s:.1f} s")
    cells = []
    for mix in MIXES:
        for num_replicas in replicas:
            for samples_each in each:
                cells.append(measure_cell(mix, num_replicas, samples_each, batches))
    for barrier in BARRIERS:
        console.print(_barrier_table(barrier, cells))
    lookahead = [row for mix in MIXES for row in measure_lookahead(mix, min(64, max(replicas)), 16, 2 if options.quick else 5)]
    console.print(_lookahead_table(lookahead))
    window = measure_window(max(replicas) * max(each), max(replicas))
    console.print(f"a window of {window['samples']} samples: {window['order_ms']:.0f} ms order, {window['divide_ms']:.0f} ms division")
    if options.json:
        options.json.write_text(json.dumps({"compile_s": compile_s, "cells": cells, "lookahead": lookahead, "window": window}))
    if options.plot:
        plot(cells, options.plot)


def measure_cell(mix: Mix, num_replicas: int, samples_each: int, batches: int) -> dict:
    """All methods on the same batches."""
    ways = {name: Measured() for name in METHODS}
    bounds = []
    for batch in range(batches):
        case = Case(draw(mix, num_replicas * samples_each, seed=batch), num_replicas, mix.max_tokens)
        bounds.append(bound_over_mean(case))
        for name, method in METHODS.items():
            began_s = time.process_time()
            placed = method(case)
            ways[name].plan_ms.append(1000 * (time.process_time() - began_s))
            ways[name].moved.append(placed.moved)
            for barrier, ratio in over_bound(case, placed).items():
                ways[name].over_bound[barrier].append(ratio)
    return {
        "mix": mix.name,
        "replicas": num_replicas,
        "samples_each": samples_each,
        "bound_over_mean": statistics.mean(bounds),
        "methods": {name: asdict(measured) for name, measured in ways.items()},
    }


def measure_lookahead(mix: Mix, num_replicas: int, samples_each: int, repeats: int) -> list[dict]:
    """Time of all steps of a window over all work divided by the replicas, where each step waits for its largest sample."""
    rows = []
    for batches in LOOKAHEAD_BATCHES:
        ratios, growth = [], []
        for seed in range(repeats):
            samples = draw(mix, 16 * num_replicas * samples_each, seed)
            costs = samples.decoder_ns + samples.vision_ns
            times = []
            for window in np.split(costs, 16 // batches):
                steps = divide_window(window, Lookahead(batches, num_replicas, cost=ANY_COST), b"")
                work = np.bincount(steps, window, batches)
                times += [max(work[k] / num_replicas, window[steps == k].max()) for k in range(batches)]
                growth.append(work.max() * 16 / costs.sum())
            ratios.append(sum(times) * num_replicas / costs.sum())
        rows.append({"mix": mix.name, "batches": batches, "over_ideal": statistics.mean(ratios), "largest_step": max(growth)})
    return rows


def measure_window(global_batch_samples: int, num_replicas: int) -> dict:
    """CPU ms of a window of 8 batches."""
    count = 8 * global_batch_samples
    samples = draw(MIXES[1], count, 0)
    lookahead = Lookahead(8, num_replicas, cost=ANY_COST)
    divide_window(samples.decoder_ns, lookahead, b"")
    began_s = time.process_time()
    shuffled(10**9, 0)(np.arange(count))
    ordered_s = time.process_time()
    divide_window(samples.decoder_ns, lookahead, b"")
    return {"samples": count, "order_ms": 1000 * (ordered_s - began_s), "divide_ms": 1000 * (time.process_time() - ordered_s)}


def _warm_up(num_samples: int, num_replicas: int) -> float:
    """Seconds of the first plan of each kind."""
    case = Case(draw(MIXES[1], num_samples, 0), num_replicas, MIXES[1].max_tokens)
    began_s = time.perf_counter()
    for name in METHODS:
        if name.startswith("ours"):
            METHODS[name](case)
    return time.perf_counter() - began_s


def _barrier_table(barrier: str, cells: Sequence[dict]) -> Table:
    names = SHOWN[barrier]
    table = Table(title=f"barrier: {barrier} - percent above the bound (worst batch); ms to plan")
    above_rows = ["same, over the bound with rows"] if barrier == "microbatch" else []
    for title in ("mix", "replicas", "each", "bound / mean", *names, *above_rows, "plan, ms"):
        table.add_column(title, justify="left" if title == "mix" else "right")
    for cell in cells:
        figures = [_figure(name, cell["methods"][name], barrier) for name in names]
        plan_ms = statistics.median(cell["methods"][names[-1]]["plan_ms"])
        if barrier == "microbatch":
            figures.append(_figure(names[-1], cell["methods"][names[-1]], "microbatch, rows"))
        numbers = (str(cell["replicas"]), str(cell["samples_each"]), f"{cell['bound_over_mean']:.2f}")
        table.add_row(cell["mix"], *numbers, *figures, f"{plan_ms:.1f}")
    return table


def _figure(name: str, measured: dict, barrier: str) -> str:
    ratios = [100 * (ratio - 1) for ratio in measured["over_bound"][barrier]]
    mean = statistics.mean(ratios)
    if not name.startswith("ours"):
        return f"{mean:.0f}"
    moved = f", {statistics.mean(measured['moved']):.0%} moved" if "spill" in name else ""
    return f"{mean:.2f} ({max(ratios):.1f}{moved})"


def _lookahead_table(rows: Sequence[dict]) -> Table:
    table = Table(title="lookahead, 16 samples each, growth at most 2: time / ideal (largest step / mean step)")
    table.add_column("mix")
    for batches in LOOKAHEAD_BATCHES:
        table.add_column(f"{batches} batches", justify="right")
    for mix in MIXES:
        own = [row for row in rows if row["mix"] == mix.name]
        table.add_row(mix.name, *(f"{row['over_ideal']:.3f} ({row['largest_step']:.1f})" for row in own))
    return table


def plot(cells: Sequence[dict], path: Path) -> None:
    """Bars of percent above the bound, per barrier, in the largest cell of each mix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    largest = [max((c for c in cells if c["mix"] == mix.name), key=lambda c: (c["replicas"], c["samples_each"])) for mix in MIXES]
    figure, axes = plt.subplots(1, len(BARRIERS), figsize=(16, 5))
    for axis, barrier in zip(axes, BARRIERS, strict=True):
        width = 0.8 / len(SHOWN[barrier])
        for number, name in enumerate(SHOWN[barrier]):
            heights = [100 * (statistics.mean(cell["methods"][name]["over_bound"][barrier]) - 1) for cell in largest]
            axis.bar(np.arange(len(largest)) + number * width, np.maximum(heights, 0.01), width, label=name)
        axis.set_yscale("log")
        axis.set_xticks(np.arange(len(largest)) + 0.4 - width / 2, [cell["mix"] for cell in largest], rotation=15)
        axis.set_title(f"one barrier per {barrier}")
        axis.legend(fontsize=8)
    axes[0].set_ylabel(f"percent above the lower bound, {largest[0]['replicas']} replicas x {largest[0]['samples_each']} samples")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
