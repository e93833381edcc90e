"""Write the records of a JSONL file, with their media, as webdataset shards.

    python data_tools/make_shards.py train.jsonl data/train
    python data_tools/make_shards.py train.jsonl data/train --skip-bad --workers 16
    python data_tools/make_shards.py train.jsonl data/train --keep-web

A record is a chat, {"id", "messages": [{"role", "content"}]}, or a document, {"id", "document"}. Content is a string or a list of
parts: {"type": "text", "text"}, {"type": "image", "image"}, {"type": "video", "video"}, media being paths relative to the JSONL file, web
addresses or base64 data URIs. Optional: "task", "source", "answer". OUT_DIR appears when everything is written. Then run
index_shards.py.

What is at a web address is fetched to the shards. With --keep-web it stays where it is: indexing fetches it to learn its size and
checksum, and training fetches it again.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_keye.config.options import add_options, read_options
from megatron_keye.config.schema import StorageConfig
from megatron_keye.data.web_media import SETTINGS as WEB_SETTINGS
from megatron_keye.data.writing import ShardPlan, format_problems, plan_shards, write_shards
from megatron_keye.errors import DataError, KeyeError

REPORT = "skipped.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="INPUT.jsonl")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="must not exist or be empty")
    parser.add_argument("--shard-bytes", type=int, default=1 << 28, help="size of a shard, about (default %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that write (default: all cores, %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help=f"leave bad records out and list them in OUT_DIR/{REPORT}")
    group = parser.add_argument_group("media at web addresses")
    group.add_argument("--keep-web", action="store_true", help="leave them where they are")
    add_options(group, StorageConfig, WEB_SETTINGS)
    arguments = parser.parse_args()
    if arguments.shard_bytes < 1 or arguments.workers < 1:
        parser.error(f"--shard-bytes and --workers must be positive, found {arguments.shard_bytes} and {arguments.workers}")
    try:
        plan = make(arguments, read_options(arguments, StorageConfig, WEB_SETTINGS))
    except KeyeError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return error.exit_code
    skipped = f", {len(plan.problems)} skipped (see {REPORT})" if plan.problems else ""
    print(f"{arguments.out}: {plan.num_samples} samples in {len(plan.shards)} shards{skipped}")
    return 0


def make(arguments: argparse.Namespace, storage: StorageConfig) -> ShardPlan:
    """Write the shards, unless there are problems that must not be skipped."""
    source, out = arguments.input, arguments.out
    plan = plan_shards(source, arguments.shard_bytes, storage, arguments.keep_web)
    if plan.problems and not arguments.skip_bad:
        raise DataError(
            f"{len(plan.problems)} of {len(plan.problems) + plan.num_samples} records cannot be used:\n{format_problems(plan.problems)}\n"
            "nothing was written; correct them, or leave them out with --skip-bad"
        )
    columns = (TextColumn("writing samples"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=plan.num_samples)
        write_shards(source, out, plan, arguments.workers, lambda num_samples: progress.advance(bar, num_samples), storage)
    if plan.problems:
        lines = [json.dumps({"place": p.place, "reason": p.reason}, ensure_ascii=False) for p in plan.problems]
        (out / REPORT).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return plan


if __name__ == "__main__":
    sys.exit(main())
