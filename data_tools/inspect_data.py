"""Show what is in an indexed data set: counts, how long samples are, what they consist of, and one sample as text.

    python data_tools/inspect_data.py data/demo/train --tokenizer data/demo/tokenizer
    python data_tools/inspect_data.py data/demo/train --tokenizer data/demo/tokenizer --sample 17 --seq-length-tokens 8192

Lengths are those that samples have in a row of `--seq-length-tokens`, after media were shrunk and text was cut where need be.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_keye.config.schema import DataConfig
from megatron_keye.data.dataset import Dataset
from megatron_keye.data.index import open_index
from megatron_keye.data.tokenize import TokenizedSample
from megatron_keye.data.tokenizer import KeyeTokenizer, load_tokenizer
from megatron_keye.errors import DataError, KeyeError

HISTOGRAM_BINS = 12
BAR_WIDTH = 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with shards and index")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder that the index was made with")
    parser.add_argument("--seq-length-tokens", type=int, default=8192, help="tokens of a row (default %(default)s)")
    parser.add_argument("--sample", type=int, default=0, help="number of the sample to print (default %(default)s)")
    arguments = parser.parse_args()
    console = Console()
    try:
        variant = open_index(arguments.folder).made.variant
        tokenizer = load_tokenizer(arguments.tokenizer, variant)
        dataset = open_dataset(arguments.folder, arguments.tokenizer, tokenizer, arguments.seq_length_tokens)
        if not 0 <= arguments.sample < len(dataset):
            raise DataError(f"--sample {arguments.sample}: the data set has samples 0 to {len(dataset) - 1}")
        print_summary(console, dataset)
        print_sample(console, dataset, tokenizer, arguments.sample)
    except KeyeError as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def open_dataset(folder: Path, tokenizer_folder: Path, tokenizer: KeyeTokenizer, seq_length_tokens: int) -> Dataset:
    """The data set under the video settings that it was indexed with."""
    made = open_index(folder).made
    names = ("fps", "min_frame_tokens", "max_frame_tokens", "total_tokens", "max_frames")
    names += ("min_frame_similarity",) if made.variant == "keye_vl_1_5" else ()
    config = DataConfig(
        train=str(folder),
        tokenizer=str(tokenizer_folder),
        seq_length_tokens=seq_length_tokens,
        pad_multiple_tokens=1,
        global_batch_samples=1,
        video={name: made.video[name] for name in names},
    )
    return Dataset.open(folder, tokenizer, made.variant, config)


def print_summary(console: Console, dataset: Dataset) -> None:
    shapes = list(dataset.shapes)
    tokens = np.array([s.num_tokens for s in shapes])
    visual = np.array([s.num_visual_tokens for s in shapes])
    with_media = int(np.count_nonzero(visual))
    console.print(f"{len(shapes)} samples ({with_media} with media), {len(dataset.rejected)} too long", highlight=False)
    kinds = Counter({"text": int((tokens - visual).sum())})
    for i in range(len(dataset)):
        for layout in dataset.layouts(i):
            kinds[layout.kind] += layout.num_tokens
    shares = ", ".join(f"{name} {count / tokens.sum():.1%}" for name, count in kinds.items())
    console.print(f"{tokens.sum():,} tokens ({shares}), {sum(s.num_patches for s in shapes):,} patches", highlight=False)
    for sample_id, reason in dataset.rejected[:5]:
        console.print(f"  rejected {sample_id}: {reason}", highlight=False, markup=False)
    console.print(_histogram("tokens per sample", tokens))
    if with_media:
        console.print(_histogram("visual tokens per sample with media", visual[visual > 0]))
    for title, names in (("task", dataset.task), ("source", dataset.source)):
        console.print(_shares(title, (names(i) for i in range(len(dataset))), tokens))


def print_sample(console: Console, dataset: Dataset, tokenizer: KeyeTokenizer, sample: int) -> None:
    tokens = dataset.tokens(sample)
    patches = dataset.pixels(sample)
    sizes = [f"{s.grid.t}x{s.grid.h}x{s.grid.w}" for s in tokens.shape.segments]
    counts = f"{len(tokens.token_ids)} tokens, {int(tokens.supervised.sum())} supervised (bold)"
    console.print(f"\nsample {sample}, id {dataset.sample_id(sample)}: {counts}", highlight=False)
    console.print(f"attention segments, frames x rows x columns of patches: {' '.join(sizes) or 'none'}", highlight=False)
    for number, segment in enumerate(patches):
        console.print(f"  segment {number}: {len(segment)} patches, mean grey level {segment.mean():.0f}", highlight=False)
    for text, supervised in _stretches(tokens, tokenizer):
        console.print(text, style="bold" if supervised else "dim", markup=False, highlight=False, soft_wrap=True, end="")
    console.print()


def _stretches(tokens: TokenizedSample, tokenizer: KeyeTokenizer) -> Iterable[tuple[str, bool]]:
    """The sample's text in stretches that are all supervised or all not; runs of placeholders are counted."""
    changes = np.flatnonzero(np.diff(tokens.supervised)) + 1
    pads = "|".join(re.escape(tokenizer.decode([token])) for token in tokenizer.specials.placeholders)
    for ids, flags in zip(np.split(tokens.token_ids, changes), np.split(tokens.supervised, changes), strict=True):
        text = tokenizer.decode(ids.tolist())
        yield re.sub(rf"({pads})\1*", lambda run: f"{run[1]}*{len(run[0]) // len(run[1])}", text), bool(flags[0])


def _histogram(title: str, values: np.ndarray) -> Table:
    edges = np.unique(np.geomspace(max(1, values.min()), values.max() + 1, HISTOGRAM_BINS + 1).astype(int))
    counts, edges = np.histogram(values, edges if len(edges) > 1 else [edges[0], edges[0] + 1])
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("from", justify="right")
    table.add_column("samples", justify="right")
    table.add_column()
    for count, edge in zip(counts, edges, strict=False):
        table.add_row(str(edge), str(count), "#" * round(BAR_WIDTH * count / counts.max()))
    return table


def _shares(title: str, names: Iterable[str | None], tokens: np.ndarray) -> Table:
    samples, token_sums = Counter(), Counter()
    for name, count in zip(names, tokens, strict=True):
        samples[name or "-"] += 1
        token_sums[name or "-"] += int(count)
    table = Table(title, "samples", "tokens", "share of tokens", box=None)
    for name, count in samples.most_common():
        table.add_row(name, str(count), f"{token_sums[name]:,}", f"{token_sums[name] / tokens.sum():.1%}")
    return table


if __name__ == "__main__":
    sys.exit(main())
