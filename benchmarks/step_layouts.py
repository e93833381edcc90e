"""Step time of three placements of the ViT, side by side: on all ranks of a replica (ours), only on pipeline stage 0, and whole on
every rank of stage 0 (replicated).

    python benchmarks/step_layouts.py [--repeats 7] [--json FILE]

Each process is pinned to a core of its own. In one world, one model of each placement takes steps in turn (A B C A B C ...), so
that a drift of the machine's speed reaches all alike; the figures are ratios of medians. The model has the released one's
proportion of ViT to decoder work (about 0.2 FLOPs per visual token), and at least half of the tokens are visual.

Two cores run two processes, so TP2 and PP2 are measured; TP2 x PP2 is computed from CPU seconds per phase measured on one
process and put through the 1F1B schedule, and labelled as simulated.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

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
from megatron_keye.train.build import build_model, build_optimizer
from megatron_keye.train.placement import rank_grid
from megatron_keye.train.step import TrainStep
from megatron_keye.train.synthetic import synthetic_batch, synthetic_plan

PLACEMENTS = ("all_ranks", "stage0", "stage0_replicated")
NAMES = {"all_ranks": "all ranks (ours)", "stage0": "stage 0 only", "stage0_replicated": "replicated on stage 0"}
MODEL = (
    "model.decoder.hidden_size=256", "model.decoder.num_layers=8", "model.decoder.ffn_hidden_size=768", "model.decoder.head_dim=32",
    "model.decoder.mrope_section=[4,6,6]", "data.seq_length_tokens=512", "data.pad_multiple_tokens=16", "train.precision=fp32",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    layout: str
    visual_share: float
    median_s: dict[str, float]
    simulated: bool = False

    def ratio(self, placement: str) -> float:
        return self.median_s[placement] / self.median_s["all_ranks"]


def shapes() -> list[SampleShape]:
    """Sixteen samples of the 50 % image, 24 % video, 26 % text kind, about 70 % of whose tokens are visual."""
    grids = [(20, 24), (24, 28), (12, 16), (30, 20), (16, 40), (18, 18), (26, 22), (14, 30)]
    images = [SampleShape(h * w // 4 + 40, (Segment(PatchGrid(1, h, w), 9),)) for h, w in grids]
    videos = [SampleShape(12 * (4 + 35) + 30, tuple(Segment(PatchGrid(1, 10, 14), 4) for _ in range(12))) for _ in range(3)]
    texts = [SampleShape(n) for n in (90, 150, 210, 60, 120)]
    return images + videos + texts


def config_for(placement: str, overrides: Sequence[str]) -> RunConfig:
    return load_config("debug", [*MODEL, *overrides, f"encode.placement={placement}"])


def pin_and_adapt() -> None:
    adapt_to_cpu(float64=False)


def measure_rank(overrides: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat of every placement, taken in turn; the same on all ranks."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[dist.get_rank() % os.cpu_count()]})
    device = torch.device("cpu")
    configs = {placement: config_for(placement, overrides) for placement in PLACEMENTS}
    groups = build_groups(rank_grid(configs["all_ranks"], 1))
    prepare_megatron(groups, 0)
    steps = {}
    for placement, config in configs.items():
        model = build_model(config, groups, device)
        batch = synthetic_batch(0, synthetic_plan(shapes(), config, 1), config, groups, device)
        steps[placement] = (TrainStep(model, build_optimizer(model)), batch)
    seconds: dict[str, list[float]] = {placement: [] for placement in PLACEMENTS}
    for repeat in range(repeats + 1):
        for placement, (step, batch) in steps.items():
            dist.barrier()
            began_s = time.perf_counter()
            step.run(batch, 1.0)
            dist.barrier()
            if repeat:  # the first round warms up
                seconds[placement].append(time.perf_counter() - began_s)
    return seconds


def measure(layout: str, overrides: Sequence[str], repeats: int) -> Measured:
    seconds = run_ranks(2, partial(measure_rank, overrides, repeats), prepare=pin_and_adapt, timeout_s=600.0)[0]
    return Measured(layout, visual_share(), {placement: statistics.median(values) for placement, values in seconds.items()})


def phase_seconds(repeats: int) -> tuple[float, float, int]:
    """On one process: CPU seconds of the ViT and of the decoder in one step, and the number of microbatches."""
    config = config_for("all_ranks", ())
    groups = build_groups(rank_grid(config, 1))
    prepare_megatron(groups, 0)
    model = build_model(config, groups, torch.device("cpu"))
    replicas = synthetic_plan(shapes(), config, 1)
    batch = synthetic_batch(0, replicas, config, groups, torch.device("cpu"))
    step = TrainStep(model, build_optimizer(model))
    results = [step.run(batch, 1.0).phase_s for _ in range(repeats + 1)][1:]
    vision_s = statistics.median(phases["encode"] + phases["encode_backward"] for phases in results)
    decoder_s = statistics.median(phases["decoder"] for phases in results)
    return vision_s, decoder_s, len(replicas[0].rows)


def simulate(repeats: int, tp: int = 2, pp: int = 2) -> Measured:
    """TP x PP from one process's phases: the ViT divided over the ranks that share it, then 1F1B of equal stages, whose length is
    (microbatches + stages - 1) stage times. Communication and imbalance are left out."""
    vision_s, decoder_s, microbatches = run_ranks(1, partial(phase_seconds, repeats), prepare=pin_and_adapt, timeout_s=600.0)[0]
    pipeline_s = (microbatches + pp - 1) * decoder_s / (microbatches * tp * pp)
    sharing = {"all_ranks": tp * pp, "stage0": tp, "stage0_replicated": 1}
    return Measured(f"tp{tp}pp{pp}", visual_share(), {p: vision_s / n + pipeline_s for p, n in sharing.items()}, simulated=True)


def visual_share() -> float:
    return sum(s.num_visual_tokens for s in shapes()) / sum(s.num_tokens for s in shapes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="counted rounds (default 7)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    rows = [
        measure("tp2", ["parallel.tp=2"], args.repeats),
        measure("pp2", ["parallel.pp=2"], args.repeats),
        simulate(args.repeats),
    ]
    table = Table(title=f"step time relative to the ViT on all ranks; {100 * visual_share():.0f} % of the tokens are visual")
    for column in ("layout", "how", *NAMES.values()):
        table.add_column(column)
    for row in rows:
        cells = [f"{row.ratio(p):.2f}x ({row.median_s[p]:.3f} s)" for p in PLACEMENTS]
        table.add_row(row.layout, "simulated" if row.simulated else "measured", *cells)
    Console().print(table)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump([asdict(row) for row in rows], file, indent=2)


if __name__ == "__main__":
    main()
