"""Merge models: averages, task arithmetic, and another choice for each part of the model, as a recipe says.

    python data_tools/merge.py recipe.yaml --output models/merged --dry-run
    python data_tools/merge.py recipe.yaml --output models/merged
    python data_tools/merge.py recipe.yaml --output checkpoints/merged --format native      # to train on from: model.init_from

A recipe:

    models:                          # Hugging Face folders, checkpoints or run directories, relative to this file
      base: checkpoints/keye_vl_1_5_8b
      code: runs/annealing_code
      math: runs/annealing_math
    like: base                       # settings, types and other files are those of this one; default: the first
    rules:                           # of each tensor, the first rule with a pattern that fits its name decides
      - {tensors: ["visual.*", "mlp_AR.*"], take: base}                    # unchanged
      - {tensors: ["model.layers.[0-9].*"], average: {code: 2, math: 1}}   # weights are divided by their sum
      - {task: {base: base, add: {code: 0.7, math: 0.3}}}                  # base + 0.7 (code - base) + 0.3 (math - base)

Sums are computed in float64 and rounded once. Tensors are streamed, so memory does not grow with the models.
"""

import argparse
import sys
from pathlib import Path

from megatron_keye.checkpoint.console import add_output_arguments, add_shard_size_argument, write_output
from megatron_keye.checkpoint.convert import DTYPES, Conversion
from megatron_keye.checkpoint.merge import describe_merge, plan_merge
from megatron_keye.checkpoint.merge_recipe import read_recipe
from megatron_keye.errors import KeyeError


def main(argv: list[str] | None = None) -> int:
    """0 when done, else the exit code of the error."""
    arguments = _parser().parse_args(argv)
    try:
        write_output(arguments, "merging", lambda: _planned(arguments))
    except KeyeError as error:
        print(f"merge: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _planned(arguments: argparse.Namespace) -> Conversion:
    recipe = read_recipe(arguments.recipe)
    merge = plan_merge(recipe, arguments.format, arguments.max_shard_size, arguments.dtype)
    for line in describe_merge(recipe, merge.tensors.specs):
        print(line)
    return merge


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("--format", choices=("hf", "native"), default="hf", help="Hugging Face folder or checkpoint (default: %(default)s)")
    own = "those of the model that `like` names, or the precision of its run"
    parser.add_argument("--dtype", choices=DTYPES, help=f"type of the weights (default: {own})")
    add_output_arguments(parser)
    add_shard_size_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
