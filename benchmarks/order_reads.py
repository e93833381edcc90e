"""Reading shards over HTTP with latency: our two-level block order beside a full shuffle, without a local cache and with one.

    python -m benchmarks.order_reads [--steps 12] [--latency-ms 20] [--json FILE] [--plot FILE]

A server of this process answers byte ranges after a pause. Both orders take the same number of steps through the loader of a run. Counted
are the server's requests for bytes of shards, and those bytes. Without a cache each record is read alone; with one, which has room for the
chunks of one window of blocks, in chunks.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import http_folder
from benchmarks.shard_sets import VARIANT, config_for, kept_set
from megatron_keye.config.schema import RunConfig
from megatron_keye.data.mixture import open_samples
from megatron_keye.data.tokenizer import load_tokenizer
from megatron_keye.plan.cursor import Cursor
from megatron_keye.train.loading import Loading
from megatron_keye.train.placement import Planner

NUM_SAMPLES = 2000
BLOCK_BYTES, BLOCKS_PER_WINDOW = 64 << 10, 8
CHUNK_BYTES = 64 << 10
WINDOW_BYTES = BLOCKS_PER_WINDOW * (BLOCK_BYTES + CHUNK_BYTES)
"""Blocks do not begin where chunks do."""
CACHE_BYTES = WINDOW_BYTES * 5 // 4
"""Room is made for a tenth of the cache at a time, and the next window begins before this one is forgotten."""
ORDERS = {
    "blocks": (f"data.order.block_bytes={BLOCK_BYTES}", f"data.order.blocks_per_window={BLOCKS_PER_WINDOW}"),
    "full shuffle": (f"data.order.block_bytes={1 << 40}",),
}


@dataclass
class Traffic:
    """Ranges of shards that were asked for, in order."""

    ranges: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(end - begin for _, begin, end in self.ranges)


@dataclass(frozen=True)
class Reads:
    """What one order cost."""

    samples_per_s: float
    requests: int
    num_bytes: int


@contextmanager
def serving(folder: Path, latency_s: float) -> Iterator[tuple[str, Traffic]]:
    """A server of the files of `folder` that pauses before each answer: its URL, and what it was asked for."""
    traffic, lock = Traffic(), threading.Lock()

    class FolderHandler(http_folder.Handler):
        def do_GET(self) -> None:
            time.sleep(latency_s)
            blob = (folder / self.path[1:]).read_bytes()
            wanted = self.asked_range()
            begin, last = wanted or (0, None)
            end = len(blob) if last is None else min(last + 1, len(blob))
            if wanted and self.path.endswith(".tar"):
                with lock:
                    traffic.ranges.append((self.path, begin, end))
            if wanted:
                self.send_head(206, end - begin, Content_Range=f"bytes {begin}-{end - 1}/{len(blob)}")
            else:
                self.send_head(200, len(blob))
            self.wfile.write(blob[begin:end])

    with http_folder.serving(FolderHandler) as url:
        yield url, traffic


def run(config: RunConfig, traffic: Traffic, steps: int) -> Reads:
    """Take `steps` steps from the first, as a run's feed loads them."""
    tokenizer = load_tokenizer(config.data.tokenizer, VARIANT)
    dataset = open_samples(config.data.train, tokenizer, VARIANT, config.data)
    plan_at = Planner(config, 1).over(dataset.plan_data, dataset.mixture(config.data, 0).order())
    loading = Loading(config, [(config.data.train, dataset)], tokenizer.specials.endoftext)
    loader, cursor = loading.loader(dataset), Cursor()
    traffic.ranges.clear()
    began_s = time.perf_counter()
    for _ in range(steps):
        plan, cursor = plan_at(cursor)
        loader.load(plan.replicas[0])
    took_s = time.perf_counter() - began_s
    loader.close()
    loading.close()
    return Reads(cursor.position / took_s, len(traffic.ranges), traffic.num_bytes)


def compare(folder: Path, steps: int, latency_s: float) -> dict[str, Reads]:
    """By order and what is read at a time."""
    results = {}
    with serving(folder / "shards", latency_s) as (url, traffic), tempfile.TemporaryDirectory() as scratch:
        for reading, cache_bytes in (("records", 0), ("chunks", CACHE_BYTES)):
            for name, order in ORDERS.items():
                cache = (f"data.storage.cache={scratch}/{name} {reading}", f"data.storage.cache_bytes={cache_bytes}")
                threads = ("data.loader.workers=0", "data.decode_threads=8")
                config = config_for(folder, f"data.train={url}", f"data.storage.chunk_bytes={CHUNK_BYTES}", *cache, *threads, *order)
                results[f"{name}, {reading}"] = run(config, traffic, steps)
    return results


def report(results: dict[str, Reads], latency_s: float) -> Table:
    table = Table(title=f"{latency_s * 1000:.0f} ms latency, 8 requests at a time")
    for column in ("order", "samples/s", "requests", "KiB"):
        table.add_column(column, justify="left" if column == "order" else "right")
    for name, reads in results.items():
        table.add_row(name, f"{reads.samples_per_s:.0f}", f"{reads.requests:,}", f"{reads.num_bytes >> 10:,}")
    return table


def plot(results: dict[str, Reads], path: Path) -> None:
    """Bars of requests and of bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, label, heights in (
        (axes[0], "requests", [reads.requests for reads in results.values()]),
        (axes[1], "MiB", [reads.num_bytes / 2**20 for reads in results.values()]),
    ):
        axis.bar(range(len(results)), heights)
        axis.set_xticks(range(len(results)), list(results), rotation=15)
        axis.set_ylabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of 32 samples, in each order (default %(default)s)")
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--sets", type=Path, help="keep the made-up set in this folder, and take it from there")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    parser.add_argument("--plot", type=Path, help="also draw them there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = kept_set(args.sets or Path(scratch), "text", NUM_SAMPLES)
        results = compare(folder, args.steps, args.latency_ms / 1000)
    Console(width=130).print(report(results, args.latency_ms / 1000))
    if args.json:
        args.json.write_text(json.dumps({name: asdict(reads) for name, reads in results.items()}, indent=1))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
