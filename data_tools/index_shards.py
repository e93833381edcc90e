"""Index webdataset shards for training: count tokens, read media sizes, sample videos and tag their frames slow or fast.

    python data_tools/index_shards.py data/train --tokenizer data/tokenizer --variant keye_vl_1_5
    python data_tools/index_shards.py data/train --tokenizer data/tokenizer --variant keye_vl_1_5 --preset report --fps 1

Media that records name by web address are fetched once, to learn their sizes and checksums; training fetches them again.
The index holds for this tokenizer, variant and decoder, and for video settings that take the same frames; other limits on sizes and
lengths may change from run to run. It is written beside the shards, in place of an older one.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from megatron_keye.config.options import add_options, read_options
from megatron_keye.config.schema import StorageConfig, Variant, VideoConfig
from megatron_keye.data.index_tables import ShardIndex
from megatron_keye.data.indexing import index_folder, save_index
from megatron_keye.data.shards import list_shards
from megatron_keye.data.shared_counts import SharedCounts
from megatron_keye.data.web_media import SETTINGS as WEB_SETTINGS
from megatron_keye.data.writing import Problem, format_problems
from megatron_keye.errors import DataError, KeyeError


class SamplesColumn(ProgressColumn):
    """Samples that were looked at, in all processes."""

    def __init__(self, counts: SharedCounts):
        super().__init__()
        self._counts = counts

    def render(self, task: Task) -> Text:
        return Text(f"{self._counts.total():,} samples")


def main() -> int:
    arguments = _parser().parse_args()
    try:
        video = read_options(arguments, VideoConfig, VideoConfig.model_fields)
        shards = make(arguments, video, read_options(arguments, StorageConfig, WEB_SETTINGS))
    except KeyeError as error:
        print(f"index_shards: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.folder}: indexed {sum(s.num_samples for s in shards)} samples of {len(shards)} shards")
    problems = _problems(shards)
    if problems:
        print(f"left out {len(problems)}, listed with reasons in index/index.json:\n{format_problems(problems)}", file=sys.stderr)
    return 0


def make(arguments: argparse.Namespace, video: VideoConfig, storage: StorageConfig) -> list[ShardIndex]:
    """Index all shards and write the index, unless there are problems that must not be skipped."""
    source = (arguments.folder, arguments.tokenizer, arguments.variant, video)
    counts = SharedCounts(len(list_shards(arguments.folder)))
    columns = (TextColumn("indexing shards"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), SamplesColumn(counts))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(list_shards(arguments.folder)))
        shards = index_folder(*source, arguments.workers, lambda indexed: progress.advance(bar), storage, counts)
    problems = _problems(shards)
    if problems and not arguments.skip_bad:
        raise DataError(
            f"{len(problems)} samples cannot be used:\n{format_problems(problems)}\n"
            "no index was written; correct them and write the shards again, or leave them out with --skip-bad"
        )
    save_index(*source, shards)
    return shards


def _problems(shards: list[ShardIndex]) -> tuple[Problem, ...]:
    return tuple(Problem(place, reason) for s in shards for place, reason in s.problems)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with *.tar shards")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face tokenizer folder")
    parser.add_argument("--variant", choices=get_args(Variant), required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores, %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="index the rest where samples cannot be used")
    group = parser.add_argument_group("video settings", "As data.video of the run; the defaults are its defaults.")
    add_options(group, VideoConfig, VideoConfig.model_fields)
    group = parser.add_argument_group("media at web addresses", "As data.storage of the run; the defaults are its defaults.")
    add_options(group, StorageConfig, WEB_SETTINGS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
