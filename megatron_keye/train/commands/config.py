"""`keye config`: what the settings are, what they mean, and whether they fit a number of processes."""

import argparse

from megatron_keye.config.derive import replica_size, require_valid
from megatron_keye.config.explain import explain
from megatron_keye.config.load import dump_config
from megatron_keye.recipes import recipe_names, recipe_path
from megatron_keye.train.commands import add_override_argument, settings_from

HELP = "List the recipes, or print the settings that a recipe or YAML file stands for after defaults and overrides."
EXAMPLES = """\
  keye config                                   # the recipes
  keye config debug                             # all settings of one, as YAML: a starting point for your own file
  keye config debug --explain | less            # the same with type and description
  keye config debug --set parallel.tp=2 --processes 4   # checked for 4 processes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("settings", metavar="SETTINGS", nargs="?", help="recipe name or path of a YAML file; none lists the recipes")
    add_override_argument(parser)
    parser.add_argument("--explain", action="store_true", help="print every setting with its type and description")
    parser.add_argument("--processes", type=int, metavar="N", help="also check that the layout fits N processes")


def run(args: argparse.Namespace) -> int:
    """Prints to stdout. Raises SettingsError when the settings contradict themselves or do not fit the processes."""
    if args.settings is None:
        print(_recipe_list())
        return 0
    config = settings_from(args)
    require_valid(config, replica_size(config) if args.processes is None else args.processes)
    print(explain(config) if args.explain else dump_config(config), end="")
    return 0


def _recipe_list() -> str:
    """Every recipe with the comment in its first line."""
    names = recipe_names()
    width = max(map(len, names))
    first_lines = [recipe_path(name).read_text(encoding="utf-8").partition("\n")[0] for name in names]
    return "\n".join(f"{name:<{width}}  {line.removeprefix('# ')}" for name, line in zip(names, first_lines, strict=True))
