"""launch/pretrain_chain.sh: training stages as jobs that wait for each other, each starting from the checkpoint of the one before."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_keye.errors import KeyeError, SettingsError
from megatron_keye.train.supervise import submit

HELP = """Submit the stages of a chain to SLURM, each waiting for the success of the one before and starting from its last checkpoint.

The same command again submits what is neither complete nor in the queue, so it is also how a chain goes on after a failure."""
EXAMPLE = """\
a chain is a YAML file:
  runs: /shared/runs/keye                      # stages get folders in it
  options: --nodes 8 --time 1-00:00:00         # of launch/train.sh, for all stages
  stages:
    - {name: alignment, settings: keye_vl_1_5_8b_alignment, options: --set data.train=/shared/alignment}
    - {name: multitask, settings: keye_vl_1_5_8b_multitask, options: --nodes 16 --set data.train=/shared/multitask}

examples:
  launch/pretrain_chain.sh chain.yaml --dry-run      # every job, nothing submitted
  launch/pretrain_chain.sh chain.yaml"""


@dataclass(frozen=True)
class Stage:
    """A stage by name, and the arguments of launch/train.sh that make its run."""

    name: str
    arguments: tuple[str, ...]


def read_chain(path: Path) -> list[Stage]:
    """Raises SettingsError where the file is not a chain."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        runs, common = Path(content.pop("runs")), shlex.split(content.pop("options", ""))
        stages = [_stage(dict(stage), runs, common) for stage in content.pop("stages")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} is not a chain ({error!r}); `launch/pretrain_chain.sh --help` shows one") from error
    names = [stage.name for stage in stages]
    if content or not stages or len(set(names)) < len(names):
        raise SettingsError(f"{path}: expected `runs`, `options` and `stages` with different names, found {[*content, *names]}")
    links = [("--continues", str(runs / before)) for before in names[:-1]]
    return [Stage(stage.name, (*stage.arguments, *link)) for stage, link in zip(stages, [(), *links], strict=True)]


def _stage(fields: dict, runs: Path, common: Sequence[str]) -> Stage:
    name, settings, own = fields.pop("name"), fields.pop("settings"), shlex.split(fields.pop("options", ""))
    if fields:
        raise ValueError(f"unknown fields {sorted(fields)} of the stage {name}")
    return Stage(name, (settings, *common, *own, "--run-dir", str(runs / name)))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="launch/pretrain_chain.sh", description=HELP, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chain", type=Path, metavar="CHAIN", help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="show every job; submit nothing")
    args = parser.parse_args(argv)
    try:
        # All stages are checked before the first is submitted.
        jobs = [submit.make_job(submit.parser().parse_args(stage.arguments)) for stage in read_chain(args.chain)]
        after = None
        for job, config in jobs:
            if args.dry_run:
                print(submit.described(job, after), end="\n\n")
                after = f"JOB_OF_{Path(job.run_dir).name}"
            else:
                after = submit.submit(job, config, after)
    except KeyeError as error:
        print(f"launch/pretrain_chain.sh: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
