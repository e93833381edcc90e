"""How well measured times and FLOPs predict rows that neither has seen.

    python -m benchmarks.calibration [RECIPE] [--seconds 60] [--layout one] [--json FILE]

In one world, the model of RECIPE runs the rows of `keye calibrate` and, in turn with them, held-out rows: random mixes of texts, images
and clips. Measured times predict each row's ViT and decoder by their coefficients; FLOPs by one factor each, the median of time per FLOP
over the same calibration steps. Figures are relative errors |predicted / measured - 1|. On one process, times are CPU seconds, so that
other processes on the machine do not count; with more, wall-clock seconds, on a machine that does nothing else.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_keye.config.load import load_config
from megatron_keye.config.schema import RunConfig
from megatron_keye.contract.media import MERGE, PatchGrid, SampleShape, Segment
from megatron_keye.parallel.cpu import adapt_to_cpu
from megatron_keye.parallel.launch import run_ranks
from megatron_keye.plan.cost import CostModel, cost_model
from megatron_keye.plan.timing import PS_PER_S, TimeModel, Work
from megatron_keye.train.calibrate import Measurement, calibration_of, measure
from megatron_keye.train.calibration_design import DesignedStep, designed_steps
from megatron_keye.train.layouts import parse_layout
from megatron_keye.train.runtime import of_started_world

HELD_OUT_ROWS = 40
PERCENTILES = (50, 95, 100)
Predict = Callable[[Work], float]


def held_out(config: RunConfig, seed: int) -> list[DesignedStep]:
    """Rows of random fullness, of samples of random kinds and sizes."""
    rng, limit, multiple = np.random.default_rng(seed), config.data.seq_length_tokens, config.data.pad_multiple_tokens
    steps = []
    for number in range(HELD_OUT_ROWS):
        samples, room = [], int(limit * rng.uniform(0.15, 1.0)) // multiple * multiple
        while room >= multiple:
            sample = _sample(rng, room, config.data.image.max_tokens)
            samples.append(sample)
            room -= -(-sample.num_tokens // multiple) * multiple
        steps.append(DesignedStep(f"held out {number}", tuple(samples)))
    return [step for step in steps if step.samples]


def _sample(rng: np.random.Generator, room: int, most_image_tokens: int) -> SampleShape:
    """A text, an image or a clip of frames, log-uniform in size, of at most `room` tokens."""
    kind = rng.choice(("text", "image", "clip"))
    size = int(np.exp(rng.uniform(np.log(16), np.log(room))))
    frames = int(rng.integers(2, 12)) if kind == "clip" else 1
    side = int(np.sqrt(min(size - 8, most_image_tokens * frames) / frames))
    if kind == "text" or side < 2:
        return SampleShape(size)
    grid = PatchGrid(1, MERGE * side, MERGE * side)
    return SampleShape(8 + frames * grid.num_tokens, tuple(Segment(grid, 4 if number == 0 else 0) for number in range(frames)))


def measure_rank(config: RunConfig, budget_s: float) -> tuple[list[Measurement], list[Measurement], TimeModel]:
    """Measurements of the calibration's rows and of the held-out ones, and the times fitted to the first."""
    import torch

    runtime = of_started_world(config, torch.device("cpu"))
    unknown = held_out(config, 0)
    clock = time.process_time if runtime.groups.world.size() == 1 else time.perf_counter
    found = measure(config, runtime, [*designed_steps(config), *unknown], budget_s, lambda done: None, clock)
    names = {step.name for step in unknown}
    seen, unseen = ([m for m in found if (m.step in names) == is_unseen] for is_unseen in (False, True))
    return seen, unseen, calibration_of(seen, config, runtime).time_model


def modules(measurements: Sequence[Measurement]) -> dict[str, list[tuple[Work, float]]]:
    """Work and seconds of the ViT, both passes together, and of the decoder."""
    by_part = {part: [(m.work, m.seconds) for m in measurements if m.part == part] for part in {m.part for m in measurements}}
    passes = zip(by_part["vision_forward"], by_part["vision_backward"], strict=True)
    return {"ViT": [(work, forward + backward) for (work, forward), (_, backward) in passes], "decoder": by_part["decoder"]}


def predictors(cost: CostModel, times: TimeModel, seen: dict[str, list[tuple[Work, float]]]) -> dict[str, dict[str, Predict]]:
    """Seconds of some work by FLOPs and by measured times, for each module."""
    flops = {
        "ViT": lambda work: (cost.vision_patch + cost.projector_token / MERGE**2) * work.tokens + cost.vision_pair * work.pairs,
        "decoder": lambda work: cost.decoder_token * work.tokens + cost.decoder_pair * work.pairs,
    }
    factor = {name: float(np.median([seconds / flops[name](work) for work, seconds in seen[name]])) for name in seen}
    coefficients = {"ViT": times.vision, "decoder": times.decoder}
    return {
        name: {
            "FLOPs": lambda work, name=name: factor[name] * flops[name](work),
            "measured times": lambda work, name=name: coefficients[name].time_ps(work) / PS_PER_S,
        }
        for name in seen
    }


def errors(predict: Predict, pairs: Sequence[tuple[Work, float]]) -> list[float]:
    """Percentiles of the relative error."""
    relative = [abs(predict(work) / seconds - 1.0) for work, seconds in pairs]
    return [float(np.percentile(relative, p)) for p in PERCENTILES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="debug")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no further round after this time (default 60)")
    parser.add_argument("--layout", default="one", help="such as tp2 (default one)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    layout = parse_layout(args.layout)
    config = layout.apply(load_config(args.recipe))
    prepare = partial(adapt_to_cpu, config.train.precision == "fp64")
    seen, unseen, times = run_ranks(layout.world_size, measure_rank, config, args.seconds, prepare=prepare, timeout_s=1800.0)[0]
    known, new = modules(seen), modules(unseen)
    predict = predictors(cost_model(config.model), times, known)
    found = {name: {how: errors(predict[name][how], new[name]) for how in predict[name]} for name in new}
    table = Table(title=f"{args.recipe}, {args.layout}: relative error on {len(new['decoder'])} held-out rows")
    for column in ("module", "predicted by", *(f"p{p}" if p < 100 else "max" for p in PERCENTILES)):
        table.add_column(column)
    for name, by_method in found.items():
        for how, values in by_method.items():
            table.add_row(name, how, *(f"{value:.1%}" for value in values))
    Console().print(table)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
