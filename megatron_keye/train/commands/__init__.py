"""The subcommands of `keye`, one module each, and the arguments that several of them share."""

import argparse

from megatron_keye.config.load import load_config
from megatron_keye.config.schema import RunConfig


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """`SETTINGS` and `--set`, for commands that take the settings of a run."""
    parser.add_argument("settings", metavar="SETTINGS", help="recipe name or path of a YAML file")
    add_override_argument(parser)


def add_override_argument(parser: argparse.ArgumentParser) -> None:
    """`--set` alone, for commands where the settings are optional."""
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="NAME=VALUE",
        action="extend",
        nargs="+",
        default=[],
        help="change settings by dotted name, for example --set train.steps=10 parallel.tp=2",
    )


def settings_from(args: argparse.Namespace) -> RunConfig:
    """The settings in `args.settings`, changed by `args.overrides`. Raises SettingsError with every problem."""
    return load_config(args.settings, args.overrides)
