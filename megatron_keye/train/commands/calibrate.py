"""`keye calibrate`: measure what samples cost on this machine in a run's layout."""

import argparse
import os
import warnings
from pathlib import Path

from megatron_keye.config.schema import RunConfig
from megatron_keye.train.commands import add_settings_arguments, settings_from

HELP = """Measure how long the ViT and the decoder take, forward and backward, on rows of many kinds: long and short texts, small and large
images, clips of many frames. Fit coefficients per token, per query-key pair, per item and per sequence to it, and write them to a file
for data.cost_file. Placement then evens out times on this machine rather than FLOPs; which samples a step holds stays the same.

The file holds for the model, layout, precision and kernels of the settings; a run with other ones refuses it. Measure on the machine that
will train, while nothing else runs there. It starts the processes of one replica itself, or uses those of torchrun."""
EXAMPLES = """\
  keye calibrate debug --dry-run                                 # what would be measured; starts nothing
  keye calibrate debug                                           # two minutes at most; writes debug.cost.json
  keye calibrate debug --set parallel.tp=2 -o tp2.cost.json --plot tp2.png
  launch/local.sh -n 2 debug --run-dir runs/tp2 --set parallel.tp=2 data.cost_file=tp2.cost.json
  torchrun --nproc-per-node 8 -m megatron_keye.train.cli calibrate keye_vl_1_5_8b -o 8b.cost.json"""

NOISY_ERROR = 0.2
"""Of a fit, beyond which its measurements are not believed to be of these modules alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_settings_arguments(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="where the times go (default: NAME.cost.json)")
    parser.add_argument("-n", "--processes", type=int, metavar="N", help="processes to start (default: those of one replica)")
    parser.add_argument("--seconds", type=float, default=120.0, metavar="S", help="begin no further round after this time (default: 120)")
    parser.add_argument("--plot", metavar="FILE", help="also draw predicted against measured times there (.png, .svg, .pdf)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be measured, and start nothing")


def run(args: argparse.Namespace) -> int:
    """Raises SettingsError where the settings do not fit the processes, PlanError where times cannot be fitted."""
    from megatron_keye.config.derive import replica_size, require_valid

    config = settings_from(args)
    processes = int(os.environ.get("WORLD_SIZE", args.processes or replica_size(config)))
    require_valid(config, processes)
    if args.dry_run:
        return _describe(config, processes)
    with warnings.catch_warnings():
        # Megatron says on import, and torch at every rank's first collective, what nobody can act on here.
        warnings.simplefilter("ignore")
        calibration = _calibrate(config, processes, args.seconds)
    if int(os.environ.get("RANK", "0")) == 0:
        _write(calibration, args)
    return 0


def _describe(config: RunConfig, processes: int) -> int:
    from megatron_keye.train.calibration_design import designed_steps

    parallel, steps = config.parallel, designed_steps(config)
    print(f"{processes} processes: tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp}; {len(steps)} kinds of rows, each in rounds:")
    for step in steps:
        tokens, patches = sum(s.num_tokens for s in step.samples), sum(s.num_patches for s in step.samples)
        print(f"  {step.name}: {tokens:,} tokens, {patches:,} patches")
    return 0


def _calibrate(config: RunConfig, processes: int, budget_s: float):
    """The calibration, on rank 0 at least."""
    from functools import partial

    from megatron_keye.parallel.launch import run_ranks
    from megatron_keye.train import runtime
    from megatron_keye.train.verify import prepare_rank

    if "RANK" in os.environ:
        try:
            return calibrate_rank(config, runtime.start(config), budget_s)
        finally:
            runtime.stop()
    prepare = partial(prepare_rank, config.train.precision == "fp64")
    # Building a large model and its first step may take long; the budget only ends the rounds.
    return run_ranks(processes, _forked_rank, config, budget_s, prepare=prepare, timeout_s=1800.0 + 10 * budget_s)[0]


def _forked_rank(config: RunConfig, budget_s: float):
    import torch

    from megatron_keye.train.runtime import of_started_world

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return calibrate_rank(config, of_started_world(config, device), budget_s)


def calibrate_rank(config: RunConfig, runtime, budget_s: float):
    """One rank's part of the measurement; the main rank shows how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from megatron_keye.train.calibrate import ROUNDS, calibration_of, measure
    from megatron_keye.train.calibration_design import designed_steps

    steps = designed_steps(config)
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False, disable=not runtime.is_main) as progress:
        task = progress.add_task("", total=ROUNDS * len(steps))
        found = measure(config, runtime, steps, budget_s, lambda done: progress.update(task, completed=done, refresh=True))
    return calibration_of(found, config, runtime)


def _write(calibration, args: argparse.Namespace) -> None:
    from rich.console import Console

    from megatron_keye.train.calibration import save_calibration

    path = Path(args.output or f"{Path(args.settings).stem}.cost.json")
    save_calibration(calibration, path)
    console = Console()
    console.print(_table(calibration))
    worst = max(part.error_p95 for _, part in calibration.parts)
    if worst > NOISY_ERROR:
        console.print(f"a fit is off by {worst:.0%}: something else was running here; measure again on a quiet machine", highlight=False)
    if args.plot:
        from megatron_keye.train.calibration_plot import plot

        plot(calibration, Path(args.plot))
        console.print(f"{args.plot}: predicted against measured", highlight=False)
    console.print(f"{path}: set data.cost_file={path} to place samples by these times", highlight=False, soft_wrap=True)


def _table(calibration):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    machine = calibration.machine
    title = f"{machine.processes} process(es) on {machine.device} of {machine.host}"
    caption = "n measurements; relative error of the fit: 95th percentile, largest"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("part", "n", "ns/token", "ns/pair", "us/item", "us/sequence", "p95", "max"):
        table.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    for name, part in calibration.parts:
        c = part.coefficients
        per_unit = f"{c.token_ps / 1e3:,.0f}", f"{c.pair_ps / 1e3:.3f}", f"{c.item_ps / 1e6:,.0f}", f"{c.sequence_ps / 1e6:,.0f}"
        table.add_row(name, str(len(part.measurements)), *per_unit, f"{part.error_p95:.1%}", f"{part.error_max:.1%}")
    return table
