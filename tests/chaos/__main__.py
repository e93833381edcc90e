"""Train a tiny model while its processes are killed, stopped and starved of disk, and prove that it made no difference.

A campaign is a list of lives that follows from --seed. Each life starts the run under a layout, a prefetch depth and a number of
decode workers of its own, and saves at once or in the background; ranks, replica leaders, all ranks at once, or decode workers are killed
(SIGKILL), stopped for a while (SIGSTOP), or find the disk full. Half of the moments are uniform over the wall time of a life, the others
within a phase. Where a run is complete, the next life begins a new one.

After each life: every checkpoint is whole, none was lost, no process is left, nothing was decoded to be skipped. After each run: the
ledger proves itself; steps hold the samples of an undisturbed run, and their places the same tokens and pixels; losses are the same
within rounding, or bit for bit with --layouts dp2.

A difference ends the campaign with exit code 1 and names it. Moments are those of the seed, but what a process is at when one comes
depends on the machine: repeat a failure several times.
"""

import argparse
import json
import shlex
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megatron_keye.errors import SettingsError
from megatron_keye.train.layouts import parse_layout
from tests.chaos.board import MAX_RANKS, Board
from tests.chaos.campaign import Report, run_campaign
from tests.chaos.faults import FAULTS
from tests.chaos.life import ChaosError
from tests.chaos.rank import WatchedTraining
from tests.chaos.scene import Scene, set_scene
from tests.chaos.schedule import FATAL, HARMLESS, LAYOUTS, PHASES, schedule

EXAMPLES = """\
examples:
  python -m tests.chaos --lives 10                     # half a minute
  python -m tests.chaos --seed 7 --lives 300           # what `make chaos` does
  python -m tests.chaos --layouts dp2 --lives 30       # one layout: losses must be equal bit for bit
  python -m tests.chaos --fault frontier --lives 10    # a deliberate fault, which must be found"""


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    console = Console()
    again = f"python -m tests.chaos {shlex.join(argv)}"
    lives = schedule(args.seed, args.lives, args.layouts)
    place = tempfile.TemporaryDirectory(prefix="chaos-") if args.keep is None else nullcontext(args.keep)
    # Without a thread that refreshes the bar: ranks are forked from this process.
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with place as folder, Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("an undisturbed run", total=len(lives))
        progress.refresh()

        def show(number: int, report: Report) -> None:
            note = f"{len(report.kills)} kills, {report.num_restarts} restarts, {len(report.restarts)} runs"
            progress.update(task, completed=number, description=note, refresh=True)

        try:
            board = Board()
            scene = set_scene(_made(folder), board)
            report = run_campaign(scene, lives, Path(folder), board, show, FAULTS.get(args.fault, WatchedTraining))
        except ChaosError as error:
            progress.stop()
            console.print(f"[bold red]a difference[/]: {again}", highlight=False)
            console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            return 1
    _print(console, report, scene)
    if args.json:
        args.json.write_text(json.dumps(_fields(report, scene), indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="what to draw the lives from (default: 0)")
    parser.add_argument("--lives", type=int, default=30, metavar="K", help="lives with a violent end, 2 to 5 s each (default: 30)")
    layouts = f"from which to draw (default: {' '.join(LAYOUTS)})"
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="NAME", type=_layout, help=layouts)
    parser.add_argument("--fault", choices=sorted(FAULTS), help="put in a fault that must be found")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where data, runs and their logs stay (default: removed at the end)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    return parser


def _layout(name: str) -> str:
    """Raises ArgumentTypeError, which is what argparse shows."""
    try:
        world_size = parse_layout(name).world_size
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if world_size > MAX_RANKS:
        raise argparse.ArgumentTypeError(f"{name} has {world_size} ranks, expected at most {MAX_RANKS}")
    return name


def _made(folder: str | Path) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def _print(console: Console, report: Report, scene: Scene) -> None:
    counts = report.per_phase()
    kinds = [kind for kind in (*FATAL, *HARMLESS) if any(kind == found for _, found in counts)]
    table = Table("at", *[kind.replace("_", "\n") for kind in kinds], "all", title="Acts of violence, by what the victim was at")
    for phase in PHASES:
        row = [counts[phase, kind] for kind in kinds]
        table.add_row(phase.replace("_", " "), *[str(count or "") for count in row], str(sum(row) or ""))
    table.add_row("all", *[str(sum(counts[phase, kind] for phase in PHASES)) for kind in kinds], str(counts.total()), style="bold")
    console.print(table)
    restarts = ", ".join(f"{count} {where}" for where, count in report.restarts_at(scene).items())
    console.print(
        f"{len(report.kills)} kills, {report.kills_while_writing} of them while a checkpoint was written in the background.\n"
        f"{report.num_restarts} restarts ({restarts}; {report.most_in_a_row} in a row at most) of "
        f"{len(report.restarts)} runs.\nEvery step has the samples of the undisturbed run; largest difference of a loss "
        f"{report.worst_loss_difference:.1e} of it.",
        highlight=False,
    )


def _fields(report: Report, scene: Scene) -> dict:
    per_phase = {phase: {kind: n for (at, kind), n in report.per_phase().items() if at == phase} for phase in PHASES}
    return {
        "kills": len(report.kills), "kills_while_writing": report.kills_while_writing, "per_phase": per_phase,
        "restarts": report.num_restarts, "runs": len(report.restarts),
        "restarts_at": report.restarts_at(scene), "most_restarts_in_a_row": report.most_in_a_row,
        "worst_loss_difference": report.worst_loss_difference,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
