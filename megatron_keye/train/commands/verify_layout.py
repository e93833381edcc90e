"""`keye verify-layout`: proof that parallel layouts change nothing."""

import argparse
import json
import re
import warnings
from pathlib import Path

from megatron_keye.train.commands import add_settings_arguments, settings_from

DEFAULT_LAYOUTS = (
    "tp2", "pp2", "cp2", "dp2", "tp2sp", "tp2pp2", "tp2cp2", "cp2pp2", "tp2dp2", "cp2dp2", "pp2dp2", "pp2vp2", "tp2cp2sp", "dp2recompute",
)  # fmt: skip
PRECISIONS = {"float64": "fp64", "float32": "fp32", "bf16": "bf16"}

HELP = """Run the same two training steps, with the same weights and samples, under each layout and on one process, and compare:
loss, gradient norm, every gradient before clipping, every weight afterwards; per module, max|a - b| / max|b|.

Only the model of the settings is used; samples are made up, and their rows are short. A layout's name is made of tpN cpN ppN vpN dpN
and sp (sequence parallelism), recompute (decoder and vision layers), reencode (the encoder's forward runs again in its backward).
float64 must agree within 1e-10; other precisions within twice what rounding does to one process (reordered microbatches, or the next
wider precision). Exit code 1 beyond that. Processes are started as needed; where there are GPUs, a layout takes one per rank."""
EXAMPLES = """\
  keye verify-layout debug                                    # the usual layouts, float64
  keye verify-layout debug_preview --layouts tp2sp cp2pp2     # some
  keye verify-layout debug --layouts tp2 --dtype bf16 --json layouts.json
  keye verify-layout keye_vl_1_5_8b --layouts tp2 cp2 --set model.vision.num_layers=2 model.vision.carried_position_rows=1 \\
      model.decoder.num_layers=4 model.decoder.hidden_size=256 model.decoder.ffn_hidden_size=512 model.decoder.vocab_size=4096
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_settings_arguments(parser)
    parser.add_argument("--layouts", nargs="+", metavar="NAME", default=DEFAULT_LAYOUTS, help=f"default: {' '.join(DEFAULT_LAYOUTS)}")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float64", help="precision of weights and activations (default: float64)")
    parser.add_argument("--json", metavar="FILE", help="also write everything there: losses, norms, differences of each module")


def run(args: argparse.Namespace) -> int:
    """0 where all layouts agree, else 1. Raises SettingsError where a layout does not fit the settings or the machine."""
    with warnings.catch_warnings():
        # Megatron says on import, and torch at every rank's first collective, what nobody can act on here.
        warnings.simplefilter("ignore")
        return _verify(args)


def _verify(args: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_keye.train.layouts import parse_layout
    from megatron_keye.train.verify import proof_config
    from megatron_keye.train.verify_report import as_json, check_layouts, run_layouts, run_reference

    config = proof_config(settings_from(args), PRECISIONS[args.dtype])
    layouts = [parse_layout(name) for name in args.layouts]
    check_layouts(config, layouts)
    outcomes = []
    # Ranks are forked from this process, which must therefore have no display thread.
    with _progress(Console(stderr=True)) as progress:
        task = progress.add_task("one process", total=1 + len(layouts))
        progress.refresh()
        reference = run_reference(config)
        running = run_layouts(config, layouts, reference)
        for layout in layouts:
            progress.update(task, description=layout.name, advance=1, refresh=True)
            outcomes.append(next(running))
        progress.update(task, description="", advance=1, refresh=True)
    console = Console()
    console.print(_table(outcomes, reference, f"{args.settings}, {args.dtype}"))
    for outcome in outcomes:
        if outcome.error is not None:
            console.print(f"{outcome.layout.name}: {outcome.error}", markup=False, highlight=False)
    report = as_json(config, reference, outcomes)
    if args.json:
        fields = {"settings": args.settings, "set": args.overrides, **report}
        Path(args.json).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return 0 if report["ok"] else 1


def _progress(console):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)


def _table(outcomes: list, reference, title: str):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    caption = f"differences relative to one process, which took {reference.seconds:.1f} s"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("layout", "loss", "norm", "grads", "worst at", "weights", "worst at", "s", ""):
        table.add_column(name, overflow="fold", no_wrap=name != "worst at")
    for outcome in outcomes:
        verdict = "ok" if outcome.is_within(reference.limit) else "[bold red]FAIL"
        table.add_row(outcome.layout.name, *_cells(outcome), f"{outcome.seconds:.0f}", verdict)
    limit = reference.limit
    table.add_section()
    table.add_row("limit", *[f"{limit.numbers:.0e}"] * 2, f"{limit.gradients:.0e}", "", f"{limit.weights:.0e}")
    return table


def _cells(outcome) -> tuple[str, ...]:
    """The numbers of one layout, empty for one whose ranks failed."""
    from megatron_keye.train.verify_report import worst_module

    if outcome.difference is None:
        return ("",) * 6
    found = outcome.difference
    (gradient_at, gradient), (weight_at, weight) = worst_module(found.gradients), worst_module(found.weights)
    return f"{found.loss:.0e}", f"{found.grad_norm:.0e}", f"{gradient:.0e}", _short(gradient_at), f"{weight:.0e}", _short(weight_at)


def _short(module: str) -> str:
    """A module's name with what all names of the vision transformer begin with made short."""
    return re.sub(r"^visual\.vision_model\.(encoder\.|embeddings\.)?", "vit.", module)
