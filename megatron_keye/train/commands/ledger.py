"""`keye ledger`: what a run was trained on, proved, shown and compared from its files alone."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_keye.errors import LedgerError

HELP = """Work with RUN_DIR/ledger.jsonl, which says what every step was trained on.

verify   prove that every position of the order was taken exactly once, over all restarts, and that the checkpoints agree
show     list the samples of one step
diff     name the first step and slot in which two runs differ"""
EXAMPLES = """\
  keye ledger verify runs/debug                 # one run, however often it was interrupted
  keye ledger verify runs/first runs/second     # a run that went on in another directory, in this order
  keye ledger show runs/debug --step 12
  keye ledger diff runs/a runs/b"""

VERIFY = """Prove from ledgers and checkpoints alone that a run took every position of its order exactly once.

Checked line by line: the hash chain; that steps follow each other; that no position is taken twice or left out, but for those that
lookahead windows in progress still have; that positions, samples and epochs are those of the order that the ledger's head describes;
that what was due where data changed is the file in RUN_DIR/remaps, and leaves out no more than was used; and that every checkpoint holds
the samples and the chain of the step it was saved after. The first problem ends it with exit code 65."""
SHOW = """List the samples of a step: position, epoch, id and checksum from the ledger; source, task and tokens from the run's data,
where it is still what the run was trained on."""
DIFF = "Name the first step and slot in which two runs were trained on something else. Exit code 1 where there is one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, help="verify, show or diff; each has its own --help")
    verify = _action(actions, "verify", VERIFY, "  keye ledger verify runs/debug\n  keye ledger verify runs/first runs/second")
    verify.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="a run; several, in order, for one that went on elsewhere")
    show = _action(actions, "show", SHOW, "  keye ledger show runs/debug --step 12")
    show.add_argument("run_dir", metavar="RUN_DIR", help="the run")
    show.add_argument("--step", type=int, metavar="N", required=True, help="the step, counted from 0 as in metrics.jsonl")
    diff = _action(actions, "diff", DIFF, "  keye ledger diff runs/a runs/b")
    diff.add_argument("first", metavar="RUN_DIR", help="a run")
    diff.add_argument("second", metavar="OTHER", help="another")


def run(args: argparse.Namespace) -> int:
    """Raises LedgerError where a ledger cannot be read or proves nothing."""
    if args.action == "verify":
        return _verify([Path(folder) for folder in args.run_dirs])
    if args.action == "show":
        return _show(Path(args.run_dir), args.step)
    return _diff(Path(args.first), Path(args.second))


def _action(actions, name: str, description: str, examples: str) -> argparse.ArgumentParser:
    return actions.add_parser(
        name,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _verify(folders: list[Path]) -> int:
    from rich.console import Console

    from megatron_keye.plan.ledger_proof import prove
    from megatron_keye.train.ledger import run_files

    with _reading(folders, "verifying") as on_bytes:
        proof = prove([run_files(folder, on_bytes) for folder in folders])
    unsaved = proof.steps - max((point.steps for point in proof.agreeing), default=0)
    facts = {
        "steps": f"{proof.steps:,}" + (f", the last {unsaved:,} in no checkpoint yet" if unsaved else ""),
        "samples": f"{proof.num_samples:,}, each position of the order once",
        "epochs begun": f"{proof.epochs:,}",
        "segments": f"{proof.segments:,}",
        "left out as unreadable": f"{proof.num_skipped:,}",
        "checkpoints that agree": ", ".join(point.name for point in proof.agreeing) or "none there",
        "open positions": _shortened(proof.open_positions) or "none",
    }
    Console().print(_facts_table(" + ".join(map(str, folders)) + ": proved", facts))
    return 0


def _show(folder: Path, step: int) -> int:
    from rich.console import Console

    from megatron_keye.train.ledger_view import step_table

    with _reading([folder], "reading") as on_bytes:
        segment, line = _find_step(folder, step, on_bytes)
    console = Console()
    table, notes = step_table(folder, segment, line)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    return 0


def _find_step(folder: Path, step: int, on_bytes: Callable[[int], None]):
    """The line of a step, and the segment line that it follows."""
    from megatron_keye.plan.ledger import SegmentLine
    from megatron_keye.train.ledger import read_ledger
    from megatron_keye.train.run_dir import RunDir

    path, segment, num_steps = RunDir(folder).ledger, None, 0
    for line in read_ledger(path, on_bytes):
        if isinstance(line, SegmentLine):
            segment = line
        elif line.step == step and segment is not None:
            return segment, line
        else:
            num_steps = line.step + 1
    raise LedgerError(f"{path} has no step {step}; expected one below {num_steps}, where it ends")


def _diff(first: Path, second: Path) -> int:
    from rich.console import Console
    from rich.table import Table

    from megatron_keye.plan.ledger_proof import first_difference
    from megatron_keye.train.ledger import read_ledger
    from megatron_keye.train.run_dir import RunDir

    with _reading([first, second], "comparing") as on_bytes:
        found = first_difference(*(read_ledger(RunDir(folder).ledger, on_bytes) for folder in (first, second)))
    if found is None:
        Console().print("the same samples in the same order, step for step")
        return 0
    where = f"step {found.step}" if found.slot is None else f"step {found.step}, slot {found.slot}"
    table = Table(title=f"first difference: {where}", title_justify="left")
    for column in ("run", found.name):
        table.add_column(column, overflow="fold")
    for folder, value in ((first, found.first), (second, found.second)):
        table.add_row(str(folder), value)
    Console().print(table)
    return 1


def _facts_table(title: str, facts: dict[str, str]):
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _shortened(positions: list[int], shown: int = 20) -> str:
    listed = ", ".join(map(str, positions[:shown]))
    return f"{listed} and {len(positions) - shown:,} more" if len(positions) > shown else listed


@contextmanager
def _reading(folders: list[Path], doing: str) -> Iterator[Callable[[int], None]]:
    """A progress bar over the bytes of ledgers, where somebody watches."""
    from rich.console import Console
    from rich.progress import Progress

    from megatron_keye.train.run_dir import RunDir

    ledgers = [RunDir(folder).ledger for folder in folders]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=sum(path.stat().st_size for path in ledgers if path.exists()))
        yield lambda num_bytes: progress.advance(task, num_bytes)
