"""What the command lines of conversion and merging share: sizes, options for an output folder, a progress bar over bytes."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_keye.checkpoint.convert import Conversion
from megatron_keye.checkpoint.new_folder import require_absent

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def size_in_bytes(text: str) -> int:
    """`5GB`, `500MB`, `1GiB` or a plain number. Raises ArgumentTypeError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 5GB, 500MB or 1GiB")
    return size


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make; must not exist or be empty")
    parser.add_argument("--force", action="store_true", help="replace the output folder if it exists")
    parser.add_argument("--dry-run", action="store_true", help="check everything and write nothing")


def add_shard_size_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-shard-size", type=size_in_bytes, default="5GB", metavar="SIZE", help="of a file of weights (default: 5GB)")


def write_output(arguments: argparse.Namespace, doing: str, plan: Callable[[], Conversion]) -> None:
    """Carry out what `plan` checks, into `--output`, with a progress bar; only say what it would be with `--dry-run`."""
    require_absent(arguments.output, arguments.force)
    conversion = plan()
    specs = conversion.tensors.specs
    text = f"{arguments.output}: {conversion.model.variant}, {len(specs)} tensors, {conversion.num_bytes / 1e9:,.2f} GB"
    if arguments.dry_run:
        print(f"{text}; checked, and nothing written")
        return
    with byte_progress() as progress:
        bar = progress.add_task(doing, total=conversion.num_bytes)
        conversion.write(arguments.output, arguments.force, lambda num_bytes: progress.advance(bar, num_bytes))
    print(text)


def byte_progress() -> Progress:
    """A progress bar on stderr, for tasks that count bytes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
