"""`keye eval`: loss and exact-answer accuracy per task on held-out data."""

import argparse
import json
from pathlib import Path

from megatron_keye.train.commands import add_override_argument

HELP = """Evaluate a run's latest checkpoint on held-out samples: per task its loss, the share of answers that greedy decoding gets
exactly right, the same with blank pixels (blind), and chance."""
EXAMPLES = """\
  keye eval --run-dir runs/debug                                  # on the run's own data.valid
  keye eval --run-dir runs/debug --data data/other/valid          # on another indexed folder
  keye eval --run-dir runs/debug --json runs/debug/eval.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", metavar="DIR", required=True, help="the run")
    parser.add_argument("--data", metavar="DIR", help="folder of indexed shards (default: data.valid of the run)")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    add_override_argument(parser)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from megatron_keye.data.dataset import Dataset
    from megatron_keye.errors import SettingsError
    from megatron_keye.train import runtime
    from megatron_keye.train.evaluate import chance_levels, evaluate
    from megatron_keye.train.inference import Scorer
    from megatron_keye.train.serving import open_run

    opened = open_run(args.run_dir, args.overrides)
    try:
        folder = args.data or opened.config.data.valid
        if folder is None:
            raise SettingsError("the run has no data.valid; name a folder of indexed shards with --data")
        dataset = Dataset.open(folder, opened.tokenizer, opened.config.model.variant, opened.config.data)
        scorer = Scorer(opened.model, opened.tokenizer.specials.endoftext)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task_id = progress.add_task("evaluating", total=2 * len(dataset))
            results = evaluate(scorer, dataset, lambda: progress.advance(task_id))
        for task, chance in chance_levels(folder).items():
            if task in results:
                results[task].chance = chance
        Console().print(_table(results, f"{args.run_dir}, step {opened.step}, on {folder}"))
        if args.json:
            fields = {"step": opened.step, "data": str(folder), "tasks": {task: r.fields() for task, r in results.items()}}
            Path(args.json).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    finally:
        runtime.stop()
    return 0


def _table(results: dict, title: str):
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in ("task", "samples", "loss", "accuracy", "blind", "chance"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, result in results.items():
        fields = result.fields()
        rates = [_percent(fields[name]) for name in ("accuracy", "blind_accuracy", "chance")]
        table.add_row(task, str(fields["samples"]), f"{fields['loss']:.3f}", *rates)
    return table


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.0f} %"
