"""What a step would gain if replicas encoded each other's excess attention segments, by the made-up mixes of `mixes.py`.

    python -m benchmarks.spill_gain [--windows 3] [--json FILE]

Today replicas meet once a step, and a step lasts as long as decoder and ViT together of its slowest replica. Segments that cross
replicas need an exchange of all of them between ViT and decoder, where everyone waits for the slowest ViT; traffic counts as free.
Steps are those of a run: eight batches are divided together. "The better each step" takes whichever is faster, step by step.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.balance_methods import METHODS, Case
from benchmarks.mixes import MIXES, Mix, Samples, draw
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.lookahead import Lookahead, divide_window
from megatron_keye.plan.spread import sum_by_bin

REPLICAS, SAMPLES_EACH = (8, 64), (1, 2, 4, 16)
BATCHES = 8
ANY_COST = CostModel(1, 0, 0, 0, 0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=3, help="windows of eight batches in each cell")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    cells = [measure(mix, n, each, options.windows) for mix in MIXES for n in REPLICAS for each in SAMPLES_EACH]
    table = Table(title="time of all steps, of that without spill")
    for title in ("mix", "replicas", "samples each", "with spill", "the better each step", "visual tokens moved"):
        table.add_column(title, justify="left" if title == "mix" else "right")
    for cell in cells:
        figures = (f"{cell['spill']:.2f}", f"{cell['better']:.2f}", f"{cell['moved']:.0%}")
        table.add_row(cell["mix"], str(cell["replicas"]), str(cell["samples_each"]), *figures)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(cells))


def measure(mix: Mix, num_replicas: int, samples_each: int, windows: int) -> dict:
    """Means over `windows` of the times of their steps, of those without spill."""
    spill, better, moved = [], [], []
    for seed in range(windows):
        times_ns = np.array([times_of(case) for case in steps_of(mix, num_replicas, samples_each, seed)])
        without_ns, with_ns = times_ns[:, 0], times_ns[:, 1]
        spill.append(with_ns.sum() / without_ns.sum())
        better.append(np.minimum(with_ns, without_ns).sum() / without_ns.sum())
        moved.append(times_ns[:, 2].mean())
    means = {"spill": statistics.mean(spill), "better": statistics.mean(better), "moved": statistics.mean(moved)}
    return {"mix": mix.name, "replicas": num_replicas, "samples_each": samples_each, **means}


def steps_of(mix: Mix, num_replicas: int, samples_each: int, seed: int) -> Iterator[Case]:
    """The steps of one window."""
    samples = draw(mix, BATCHES * num_replicas * samples_each, seed)
    step = divide_window(samples.decoder_ns + samples.vision_ns, Lookahead(BATCHES, num_replicas, cost=ANY_COST), b"")
    for number in range(BATCHES):
        yield Case(taken(samples, np.flatnonzero(step == number)), num_replicas, mix.max_tokens)


def taken(samples: Samples, members: np.ndarray) -> Samples:
    """Some of the samples, with their segments."""
    counts = np.diff(samples.first)[members]
    first = np.concatenate([[0], np.cumsum(counts)])
    segments = np.repeat(samples.first[members] - first[:-1], counts) + np.arange(first[-1])
    columns = (samples.tokens[members], samples.decoder_ns[members], samples.vision_ns[members])
    return Samples(*columns, samples.segment_ns[segments], samples.segment_tokens[segments], first)


def times_of(case: Case) -> tuple[float, float, float]:
    """Time of a step without spill and with it, ns, and the share of visual tokens that the latter moves."""
    samples, n = case.samples, case.num_replicas
    own = METHODS["ours, step"](case)
    without_ns = sum_by_bin(own.replica, case.total_ns, n).max()
    spilled = METHODS["ours, phase + spill"](case)
    vision_ns = sum_by_bin(spilled.encoded_by, samples.segment_ns, n).max()
    return without_ns, vision_ns + sum_by_bin(spilled.replica, samples.decoder_ns, n).max(), spilled.moved


if __name__ == "__main__":
    main()
