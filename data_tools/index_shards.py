"""Index webdataset shards for training: count tokens, read media sizes, sample videos and tag their frames slow or fast.

    python data_tools/index_shards.py data/train --tokenizer data/tokenizer --variant keye_vl_1_5
    python data_tools/index_shards.py data/train --tokenizer data/tokenizer --variant keye_vl_1_5 --preset report --fps 1

The index holds for this tokenizer, variant and decoder, and for video settings that take the same frames; other limits on sizes and
lengths may change from run to run. It is written beside the shards, in place of an older one.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_keye.config.schema import Variant, VideoConfig
from megatron_keye.data.index_tables import ShardIndex
from megatron_keye.data.indexing import index_folder, save_index
from megatron_keye.data.shards import list_shards
from megatron_keye.data.writing import Problem, format_problems
from megatron_keye.errors import DataError, KeyeError, SettingsError


def main() -> int:
    arguments = _parser().parse_args()
    try:
        shards = make(arguments, _video_config(arguments))
    except KeyeError as error:
        print(f"index_shards: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.folder}: indexed {sum(s.num_samples for s in shards)} samples of {len(shards)} shards")
    problems = _problems(shards)
    if problems:
        print(f"left out {len(problems)}, listed with reasons in index/index.json:\n{format_problems(problems)}", file=sys.stderr)
    return 0


def make(arguments: argparse.Namespace, video: VideoConfig) -> list[ShardIndex]:
    """Index all shards and write the index, unless there are problems that must not be skipped."""
    source = (arguments.folder, arguments.tokenizer, arguments.variant, video)
    counter = TextColumn("{task.fields[samples]} samples")
    columns = (TextColumn("indexing shards"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), counter)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(list_shards(arguments.folder)), samples=0)

        def on_shard(indexed: ShardIndex) -> None:
            progress.update(bar, advance=1, samples=progress.tasks[bar].fields["samples"] + indexed.num_samples)

        shards = index_folder(*source, workers=arguments.workers, on_shard=on_shard)
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
    for name, field in VideoConfig.model_fields.items():
        group.add_argument(f"--{name.replace('_', '-')}", help=field.description)
    return parser


def _video_config(arguments: argparse.Namespace) -> VideoConfig:
    given = {name: getattr(arguments, name) for name in VideoConfig.model_fields if getattr(arguments, name) is not None}
    try:
        return VideoConfig(**given)
    except ValidationError as error:
        raise SettingsError([f"--{p['loc'][0].replace('_', '-')} {p['input']}: {p['msg']}" for p in error.errors()]) from error


if __name__ == "__main__":
    sys.exit(main())
