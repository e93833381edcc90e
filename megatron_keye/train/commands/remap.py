"""`keye remap`: let a stopped run go on with changed data."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from megatron_keye.train.commands import add_override_argument
from megatron_keye.train.run_dir import RunDir

HELP = """Let a stopped run go on with data that changed: samples added, removed or edited, or an index made again.

A run whose data is not what it was is refused. This says how the data changed, and which of the new samples are still due in the epoch
in progress: those that it has not used, by id and record checksum. The next start gives exactly these, each once, and then ordinary
epochs of the new data; other sources keep their places. An edited sample counts as a new one. What was used is read from the ledger; the
old data need not be there. Windows of data.lookahead in progress are given up, and what they had left becomes due again.

Nothing that is in the run directory is changed: RUN_DIR/remaps gets a file or two, which must stay there."""
EXAMPLES = """\
  keye remap runs/mine --data sets/new --dry-run       # what changed, and what would be due
  keye remap runs/mine --data sets/new
  launch/local.sh -n 8 SETTINGS --run-dir runs/mine --set data.train=sets/new
  keye remap runs/mine                                 # the folder is the same, its index was made again
  keye ledger verify runs/mine                         # proves it, over the change too"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run that is not running")
    parser.add_argument("--data", metavar="DATA", help="the new data, as in data.train (default: that of the run's settings)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be, and write nothing")
    add_override_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Raises SettingsError where no data changed, CheckpointError or LedgerError where the run cannot go on from what is there."""
    from rich.console import Console

    from megatron_keye.data.mixture import open_samples
    from megatron_keye.data.tokenizer import load_tokenizer
    from megatron_keye.train.remapping import plan_remap
    from megatron_keye.train.remaps import Remaps
    from megatron_keye.train.serving import run_settings

    run_dir = RunDir(args.run_dir)
    config = run_settings(run_dir, [*([] if args.data is None else [f"data.train={args.data}"]), *args.overrides])
    with nullcontext() if args.dry_run else run_dir.locked(wait_s=0):
        dataset = open_samples(
            config.data.train, load_tokenizer(config.data.tokenizer, config.model.variant), config.model.variant, config.data
        )
        with _reading(run_dir) as on_bytes:
            plan = plan_remap(run_dir, dataset, dataset.mixture(config.data, config.train.seed), on_bytes)
        if not args.dry_run:
            Remaps(run_dir).write(plan.saved, plan.state, plan.due)
    console = Console()
    console.print(_table(plan))
    after = f"starts from {plan.checkpoint.name} go on so with data.train={config.data.train}"
    console.print(
        f"nothing was written; without --dry-run, {after}" if args.dry_run else after, markup=False, highlight=False, soft_wrap=True
    )
    return 0


def _table(plan):
    from rich.table import Table

    table = Table(title=f"{plan.checkpoint}: data that changed, in samples", title_justify="left")
    columns = ("source", "before", "now", "unchanged", "edited", "removed", "never used", "epochs in progress", "used in them", "still due")
    for name in columns:
        table.add_column(name, justify="left" if name in ("source", "epochs in progress") else "right", overflow="fold")
    for changed in plan.sources:
        remap, found = changed.source.remap, changed.changes
        counts = (changed.before.num_samples, changed.source.num_samples, found.unchanged, found.edited, found.removed, found.new)
        epochs = ", ".join(map(str, range(remap.first_epoch, remap.end_epoch))) or "none"
        table.add_row(changed.source.name, *(f"{n:,}" for n in counts), epochs, f"{found.used:,}", f"{remap.num_due:,}")
    table.caption = "unchanged, edited and removed are of those that the ledger names: samples used since the data last changed"
    return table


@contextmanager
def _reading(run_dir: RunDir) -> Iterator[Callable[[int], None]]:
    """A progress bar over the ledger, which is read twice, where somebody watches."""
    from rich.console import Console
    from rich.progress import Progress

    num_bytes = run_dir.ledger.stat().st_size if run_dir.ledger.exists() else 0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading the ledger", total=2 * num_bytes)
        yield lambda count: progress.advance(task, count)
