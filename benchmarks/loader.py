"""Samples and tokens per second of our loader beside webdataset with torch's DataLoader, and beside Megatron-Energon.

    python -m benchmarks.loader [--kinds text image video mixed] [--repeats 3] [--json FILE] [--plot FILE]

All read the same shards with two worker processes and one that consumes, and do the same to every sample (`loader_work.py`): tokenize,
decode, resize, and cut into uint8 patches. Ours also shuffles the whole set, plans every step, and packs rows; the others read
shards from front to back and deliver batches. Pipelines take turns, so that a drift of the machine reaches all alike. Wall time
is what a run sees; CPU time, of all processes, is steadier on a busy machine.

Energon is measured where it is installed: pip install -e '.[benchmarks]'.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.loader_work import Counted, SampleWork, batched, count
from benchmarks.processes import cpu_seconds, family
from benchmarks.shard_sets import VARIANT, config_for, kept_set
from megatron_keye.config.schema import RunConfig
from megatron_keye.data.mixture import open_samples
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.plan.cursor import Cursor
from megatron_keye.train.loading import Loading
from megatron_keye.train.placement import Planner

WORKERS = 2
NUM_SAMPLES = {"text": 2000, "image": 400, "video": 60, "mixed": 400}
MEASURED_SAMPLES = {"text": 4096, "image": 128, "video": 96, "mixed": 128}
"""In one turn: many times what is under way in a pipeline's workers, which is counted for neither side."""
WARM_UP_SAMPLES = 32
MICROBATCH = 8
"""Samples that the others hand over at a time; ours takes whole steps."""
OURS = "ours"


@dataclass(frozen=True)
class Speed:
    """What one pipeline delivered in one turn."""

    samples: int
    tokens: int
    patches: int
    wall_s: float
    cpu_s: float


def ours(config: RunConfig) -> Iterator[Counted]:
    """Steps of a run with one replica, as the feed prepares them: plan, load, and begin anew."""
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer, VARIANT)
    dataset = open_samples(data.train, tokenizer, VARIANT, data)
    loading = Loading(config, [(data.train, dataset)], tokenizer.specials.endoftext)
    loader = loading.loader(dataset)
    plan_at = Planner(config, num_replicas=1).over(dataset.plan_data, dataset.mixture(data, seed=0).order())
    cursor = Cursor()
    try:
        while True:
            plan, cursor = plan_at(cursor)
            (share,) = plan.replicas
            loaded = loader.load(share)
            documents = [document for row in share.rows for document in row.documents]
            patches = sum(len(p) for own in loaded.patches.values() for p in own)
            yield Counted(len(documents), sum(document.shape.num_tokens for document in documents), patches)
    finally:
        loader.close()
        loading.close()


def webdataset_loader(config: RunConfig, with_index: bool) -> Iterator[Counted]:
    """Shards split over the workers of a DataLoader, which batch."""
    import webdataset

    shards = sorted(str(shard) for shard in Path(config.data.train).glob("*.tar"))
    stages = (
        webdataset.SimpleShardList(shards),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.map(SampleWork(config.data, with_index)),
        webdataset.batched(MICROBATCH, collation_fn=batched, partial=True),
    )
    pipeline = webdataset.DataPipeline(*stages).repeat()
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=WORKERS)
    for batch in loader:
        yield count(batch)


def energon_loader(config: RunConfig, with_index: bool) -> Iterator[Counted]:
    """The same as a crude dataset with one cooker."""
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless

    from benchmarks.energon_set import prepare

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = (Cooker(stateless(SampleWork(config.data, with_index))),)

        def batch(self, samples):
            return batched(samples)

    folder = prepare(Path(config.data.train))
    workers = WorkerConfig(rank=0, world_size=1, num_workers=WORKERS)
    dataset = get_train_dataset(
        folder, worker_config=workers, batch_size=MICROBATCH, shuffle_buffer_size=None,
        max_samples_per_sequence=None, task_encoder=Encoder(),
    )  # fmt: skip
    for batch in get_loader(dataset):
        yield count(batch)


def pipelines() -> dict[str, Callable[[RunConfig], Iterator[Counted]]]:
    """Those that can run here, by name."""
    found = {OURS: ours}
    others = {"webdataset": webdataset_loader} | ({"energon": energon_loader} if find_spec("megatron.energon") else {})
    for name, loader in others.items():
        found[f"{name}, given our index"] = partial(loader, with_index=True)
        found[f"{name}, on its own"] = partial(loader, with_index=False)
    return found


def measure(pipeline: Callable[[RunConfig], Iterator[Counted]], config: RunConfig, num_samples: int) -> Speed:
    """What a fresh pipeline needs for `num_samples`, after its start and first samples."""
    with closing(pipeline(config)) as batches:
        take(batches, WARM_UP_SAMPLES)
        pids = family(os.getpid())
        began_cpu_s, began_s = cpu_seconds(pids), time.perf_counter()
        taken = take(batches, num_samples)
        return Speed(**asdict(taken), wall_s=time.perf_counter() - began_s, cpu_s=cpu_seconds(pids) - began_cpu_s)


def take(batches: Iterator[Counted], num_samples: int) -> Counted:
    """The next batches, of `num_samples` or a little more."""
    samples = tokens = patches = 0
    while samples < num_samples:
        batch = next(batches)
        samples, tokens, patches = samples + batch.samples, tokens + batch.tokens, patches + batch.patches
    return Counted(samples, tokens, patches)


def compare(folder: Path, repeats: int, num_samples: int) -> dict[str, list[Speed]]:
    """Speeds of every pipeline on the set in `folder`, taken in turn."""
    config = config_for(folder, f"data.loader.workers={WORKERS}")
    ways = pipelines()
    speeds: dict[str, list[Speed]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, pipeline in ways.items():
            speeds[name].append(measure(pipeline, config, num_samples))
    return speeds


def rate(speed: Speed) -> float:
    return speed.samples / speed.wall_s


def cpu_ms(speed: Speed) -> float:
    """CPU time of one sample."""
    return 1000 * speed.cpu_s / speed.samples


def ratio(speeds: dict[str, list[Speed]], name: str, of: Callable[[Speed], float]) -> float:
    """The median over turns of ours over another pipeline's."""
    return statistics.median(of(own) / of(other) for own, other in zip(speeds[OURS], speeds[name], strict=True))


def report(results: dict[str, dict[str, list[Speed]]]) -> Table:
    columns = ("set", "pipeline", "samples/s", "tokens/s", "CPU ms a sample", "ours is faster by", "ours by CPU time")
    table = Table(title=f"{WORKERS} worker processes and one that consumes; medians")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    for kind, speeds in results.items():
        for name, own in speeds.items():
            tokens = statistics.median(speed.tokens / speed.wall_s for speed in own)
            figures = [f"{statistics.median(map(rate, own)):,.0f}", f"{tokens:,.0f}", f"{statistics.median(map(cpu_ms, own)):.2f}"]
            ratios = [f"{ratio(speeds, name, rate):.2f}x", f"{1 / ratio(speeds, name, cpu_ms):.2f}x"]
            table.add_row(kind, name, *figures, *ratios)
    return table


def plot(results: dict[str, dict[str, list[Speed]]], path: Path) -> None:
    """Bars of CPU time per sample, relative to ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.5))
    names = list(next(iter(results.values())))
    for number, name in enumerate(names):
        heights = [1 / ratio(speeds, name, cpu_ms) for speeds in results.values()]
        axis.bar([place + number * 0.8 / len(names) for place in range(len(results))], heights, 0.8 / len(names), label=name)
    axis.set_xticks([place + 0.4 for place in range(len(results))], list(results))
    axis.set_ylabel("CPU time of a sample, ours is 1")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(NUM_SAMPLES), choices=list(NUM_SAMPLES))
    parser.add_argument("--repeats", type=int, default=3, help="turns of each pipeline (default %(default)s)")
    parser.add_argument("--sets", type=Path, help="keep the made-up sets in this folder, and take them from there")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    parser.add_argument("--plot", type=Path, help="also draw them there")
    args = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        results = {}
        for kind in args.kinds:
            folder = kept_set(args.sets or Path(scratch), kind, NUM_SAMPLES[kind])
            results[kind] = compare(folder, args.repeats, MEASURED_SAMPLES[kind])
    Console(width=150).print(report(results))
    if args.json:
        args.json.write_text(json.dumps({k: {n: [asdict(s) for s in own] for n, own in v.items()} for k, v in results.items()}, indent=1))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
