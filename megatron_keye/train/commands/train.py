"""`keye train`: train a model, or go on with a run."""

import argparse
import os
from contextlib import nullcontext

from megatron_keye.config.derive import require_valid
from megatron_keye.config.schema import RunConfig
from megatron_keye.train.commands import add_settings_arguments, settings_from
from megatron_keye.train.run_dir import RunDir

HELP = """Train a model. The same command again goes on where the run was, or says that it is complete.

Start it with launch/local.sh on one machine, or under torchrun; alone it trains on one process."""
EXAMPLES = """\
  launch/local.sh -n 2 debug --run-dir runs/debug                 # two processes, data-parallel
  launch/local.sh -n 4 debug --run-dir runs/tp2pp2 --set parallel.tp=2 parallel.pp=2
  keye train debug --dry-run                                      # settings, layout, sizes and first plan; starts nothing
  keye train debug --dry-run --processes 4 --set parallel.cp=2    # the same as it would be on four
  touch runs/debug/STOP                                           # end at the next step, with a checkpoint
  touch runs/debug/SAVE                                           # checkpoint at the next step and go on"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings_arguments(parser)
    parser.add_argument("--run-dir", metavar="DIR", help="where the run lives (default: runs/NAME of the settings)")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and start nothing")
    parser.add_argument("--check", action="store_true", help="only check the settings, and that no start of the run is alive")
    parser.add_argument("--processes", type=int, metavar="N", help="with --dry-run or --check: for N processes")


def run(args: argparse.Namespace) -> int:
    config = settings_from(args)
    processes = args.processes or int(os.environ.get("WORLD_SIZE", "1"))
    name = os.path.splitext(os.path.basename(args.settings))[0]
    run_dir = RunDir(args.run_dir or os.path.join("runs", name))
    if args.check:
        return _check(config, processes, run_dir)
    if args.dry_run:
        from megatron_keye.train.dry_run import describe

        if _is_main():
            print(describe(config, processes))
        return 0
    return _train(config, run_dir)


def _check(config: RunConfig, processes: int, run_dir: RunDir) -> int:
    require_valid(config, processes)
    run_dir.create()
    with run_dir.locked():
        return 0


def _train(config: RunConfig, run_dir: RunDir) -> int:
    run_dir.create()
    if run_dir.is_done:
        if _is_main():
            print(f"{run_dir.path} is complete; choose another --run-dir to train again, or delete {run_dir.path}/DONE to train on")
        return 0

    from megatron_keye.train import runtime
    from megatron_keye.train.consensus import PeerError
    from megatron_keye.train.loop import Training

    with run_dir.locked() if _is_main() else nullcontext():
        started = runtime.start(config)
        try:
            Training(config, run_dir, started).run()
        except PeerError as error:
            # The rank that failed says why.
            return error.exit_code
        finally:
            runtime.stop()
    return 0


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
