"""The `keye` command. Subcommands are imported only when they are called, so that help is quick and needs no torch."""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import ModuleType
from typing import NoReturn

from megatron_keye.errors import KeyeError, SettingsError

PACKAGE = "megatron_keye.train.commands"


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: the module in `train/commands/` that implements it, and its line in `keye --help`.

    The module has HELP and EXAMPLES (texts), add_arguments(parser) and run(args) -> exit code.
    """

    module: str
    summary: str


COMMANDS = {
    "config": Command("config", "list the recipes; print the settings of one, with every description if asked"),
    "train": Command("train", "train a model, or go on with a run"),
    "eval": Command("evaluate", "loss and exact-answer accuracy per task on held-out data"),
    "score": Command("score", "log-probabilities of the supervised tokens of chat samples"),
    "checkpoint": Command("checkpoint", "list the checkpoints of a run, compare their checksums, or show what is in one"),
    "ledger": Command("ledger", "prove from its files that a run used every sample once; show or compare what steps held"),
    "remap": Command("remap", "let a stopped run go on with changed data, each sample once an epoch all the same"),
    "calibrate": Command("calibrate", "measure what samples cost on this machine, for the placement of a run"),
    "io-server": Command("io_server", "decode images and videos for training runs, or ask servers how they are"),
    "report": Command("report", "the starts of a run on SLURM: why each ended, what was lost, how much of the time trained"),
    "verify-layout": Command("verify_layout", "prove that parallel layouts give the same loss, gradients and weights"),
}

FIRST_STEPS = """\
first steps:
  keye config                                    # which recipes there are
  keye config debug --explain                    # every setting of one, with its description
  launch/local.sh -n 2 debug --run-dir runs/debug --set train.steps=100
  keye verify-layout debug --layouts tp2 pp2     # same numbers in every layout?
  keye COMMAND --help                            # what a command takes, with examples

exit codes: 0 done, or stopped on request; 65 change settings or data before another attempt; 66 the numbers went wrong;
anything else may be tried again."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are settings errors, so that launchers see exit code 65 and do not try again."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; `{self.prog} --help` shows what is accepted")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (without the program's name; None takes the process's own) and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _quiet_libraries()
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_overview())
            return 0
        name, *rest = arguments
        return _run(name, rest)
    except KeyeError as error:
        print(f"{_speaker()}: error: {error}", file=sys.stderr)
        return error.exit_code


def _quiet_libraries() -> None:
    """Leave out what libraries warn of about themselves: optional packages that are missing, deprecated calls from one to the
    other. `python -W default` or PYTHONWARNINGS shows it all."""
    if not sys.warnoptions:
        for library in ("megatron", "torch"):
            warnings.filterwarnings("ignore", module=rf"{library}\.")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"usage: keye COMMAND ...\n\nTrain Keye-VL-class vision-language models.\n\ncommands:\n{commands}\n\n{FIRST_STEPS}"


def _run(name: str, arguments: Sequence[str]) -> int:
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see `keye --help`"
        raise SettingsError(f"no command is called {name!r}: expected one of {', '.join(COMMANDS)}; {hint}")
    module = _import(name)
    parser = _Parser(
        prog=f"keye {name}",
        description=module.HELP,
        epilog=f"examples:\n{module.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments))


def _import(name: str) -> ModuleType:
    module = f"{PACKAGE}.{COMMANDS[name].module}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise KeyeError(f"keye {name} is not part of this version: there is no module {module}") from error
        raise KeyeError(
            f"keye {name} needs the Python package {error.name!r}, which is not installed here: "
            "run `make setup` and use .venv/bin/keye, or pip install -e . -c constraints.txt"
        ) from error


def _speaker() -> str:
    """`keye`, with the rank under a launcher that started several processes."""
    return f"keye [rank {os.environ['RANK']}]" if "RANK" in os.environ else "keye"


if __name__ == "__main__":
    sys.exit(main())
