"""Convert between Hugging Face folders and checkpoints, compare them, and look into them.

    python data_tools/convert.py hf-to-megatron --input models/Keye-VL-1_5-8B --output checkpoints/keye_vl_1_5_8b
    python data_tools/convert.py megatron-to-hf --input runs/mine --output models/mine
    python data_tools/convert.py verify models/Keye-VL-1_5-8B models/mine
    python data_tools/convert.py inspect checkpoints/keye_vl_1_5_8b
    python data_tools/convert.py new --llm models/Qwen3-8B --vision models/siglip-so400m-patch14-384 --variant 1_5 --output models/fresh

A checkpoint may be of a conversion or of a training run at any layout. Tensors are streamed, so memory does not grow with the model.
An output folder appears when everything is in it. docs/checkpoints.md has the details.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_keye.checkpoint.compare import differences
from megatron_keye.checkpoint.console import add_output_arguments, add_shard_size_argument, byte_progress, write_output
from megatron_keye.checkpoint.convert import DTYPES, Conversion, export_hf, import_hf, open_model
from megatron_keye.checkpoint.describe import describe
from megatron_keye.checkpoint.fresh import new_hf
from megatron_keye.checkpoint.tensors import total_bytes
from megatron_keye.errors import KeyeError

VARIANTS = {"1_5": "keye_vl_1_5", "preview": "keye_vl_preview"}
MAX_SHOWN = 40


def main(argv: list[str] | None = None) -> int:
    """0 when done, 1 when `verify` found a difference, else the exit code of the error."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyeError as error:
        print(f"convert: {error}", file=sys.stderr)
        return error.exit_code


def _import(arguments: argparse.Namespace) -> int:
    return _convert(arguments, lambda: import_hf(arguments.input))


def _export(arguments: argparse.Namespace) -> int:
    return _convert(arguments, lambda: export_hf(arguments.input, arguments.max_shard_size, arguments.dtype, arguments.template))


def _new(arguments: argparse.Namespace) -> int:
    variant = VARIANTS[arguments.variant]
    return _convert(arguments, lambda: new_hf(arguments.llm, arguments.vision, variant, arguments.seed, arguments.max_shard_size))


def _convert(arguments: argparse.Namespace, plan: Callable[[], Conversion]) -> int:
    write_output(arguments, "converting", plan)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    first, second = open_model(arguments.first), open_model(arguments.second)
    found = []
    with byte_progress() as progress:
        bar = progress.add_task("comparing", total=total_bytes(first.specs))
        for difference in differences(first, second, lambda num_bytes: progress.advance(bar, num_bytes)):
            found.append(difference)
    for line in found[:MAX_SHOWN]:
        print(line)
    if len(found) > MAX_SHOWN:
        print(f"... and {len(found) - MAX_SHOWN} more")
    print(f"{len(found)} of {len(first.specs)} tensors differ" if found else f"{len(first.specs)} tensors, equal in every bit")
    return 1 if found else 0


def _inspect(arguments: argparse.Namespace) -> int:
    print(describe(arguments.folder))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    importing = _command(commands, "hf-to-megatron", _import, "a Hugging Face folder to a checkpoint, every tensor in its own type")
    importing.add_argument("--input", type=Path, required=True, metavar="HF_DIR")
    add_output_arguments(importing)
    exporting = _command(commands, "megatron-to-hf", _export, "a checkpoint of any layout to a Hugging Face folder")
    exporting.add_argument("--input", type=Path, required=True, metavar="DIR", help="checkpoint, or run directory (its latest checkpoint)")
    own = "each tensor's own for a converted checkpoint, the run's precision for a training checkpoint"
    exporting.add_argument("--dtype", choices=DTYPES, help=f"type of the weights (default: {own})")
    exporting.add_argument("--template", type=Path, metavar="HF_DIR", help="folder to take everything but weights from (default: found)")
    add_output_arguments(exporting)
    add_shard_size_argument(exporting)
    fresh = _command(commands, "new", _new, "a Keye-VL folder from plain Qwen3 and SigLIP, with a fresh projector")
    fresh.add_argument("--llm", type=Path, required=True, metavar="QWEN3_DIR")
    fresh.add_argument("--vision", type=Path, required=True, metavar="SIGLIP_DIR", help="such as so400m-patch14-384")
    fresh.add_argument("--variant", choices=VARIANTS, required=True)
    fresh.add_argument("--seed", type=int, default=0, help="of the projector and of new token rows (default: %(default)s)")
    add_output_arguments(fresh)
    add_shard_size_argument(fresh)
    verifying = _command(commands, "verify", _verify, "compare two folders tensor by tensor; exit code 1 where they differ")
    for name in ("first", "second"):
        verifying.add_argument(name, type=Path, metavar=name.upper(), help="checkpoint, run directory or Hugging Face folder")
    inspecting = _command(commands, "inspect", _inspect, "what a folder holds")
    inspecting.add_argument("folder", type=Path, metavar="DIR", help="checkpoint, run directory or Hugging Face folder")
    return parser


def _command(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
