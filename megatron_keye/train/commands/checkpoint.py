"""`keye checkpoint`: what checkpoints a run has, whether they are whole, and what is in them."""

import argparse
import json
import time
from pathlib import Path

from megatron_keye.errors import CheckpointError, SettingsError

HELP = """Look at the checkpoints of a run. DIR is a run directory, a folder of checkpoints, or one checkpoint.

list     step, date, size, layout, and whether all files are there in their size
verify   read every byte and compare checksums; exit code 1 where something is damaged
show     what one checkpoint is: model, place of the run, versions, tensors"""
EXAMPLES = """\
  keye checkpoint list runs/debug
  keye checkpoint verify runs/debug                             # all of them
  keye checkpoint verify runs/debug/checkpoints/step_00000500   # one
  keye checkpoint show runs/debug                               # the newest
  keye checkpoint show runs/debug --tensors | grep lm_head"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "verify", "show"))
    parser.add_argument("dir", metavar="DIR", type=Path)
    parser.add_argument("--tensors", action="store_true", help="with show: a line for each tensor, with kind, type, shape and bytes")


def run(args: argparse.Namespace) -> int:
    """Raises CheckpointError where there is no checkpoint, or `show` finds a damaged manifest."""
    if args.tensors and args.action != "show":
        raise SettingsError(f"--tensors goes with show, found {args.action}: leave it out")
    from megatron_keye.checkpoint.overview import checkpoints_at

    found = checkpoints_at(args.dir)
    if args.action == "list":
        return _list(found)
    if args.action == "verify":
        return _verify(found)
    return _show(found[-1], args.tensors)


def _list(found: list[Path]) -> int:
    from rich.console import Console
    from rich.table import Table

    from megatron_keye.checkpoint.overview import overview

    table = Table("checkpoint", "step", "saved", "GB", "layout", "files")
    for path in found:
        one = overview(path)
        step = "" if one.manifest is None else f"{one.manifest.run.step:,}"
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.saved_at_s))
        state = "damaged: " + "; ".join(one.problems) if one.problems else "all there"
        table.add_row(path.name, step, saved, f"{one.num_bytes / 1e9:,.3f}", one.layout, state)
    Console().print(table)
    return 0


def _verify(found: list[Path]) -> int:
    from megatron_keye.checkpoint.console import byte_progress
    from megatron_keye.checkpoint.overview import overview
    from megatron_keye.checkpoint.store import find_damage

    damaged = 0
    with byte_progress() as progress:
        bar = progress.add_task("verifying", total=sum(overview(path).num_bytes for path in found))
        for path in found:
            damage = find_damage(path, on_bytes=lambda num_bytes: progress.advance(bar, num_bytes))
            damaged += bool(damage)
            print("\n".join([f"{path}: damaged", *(f"  - {problem}" for problem in damage)]) if damage else f"{path}: whole")
    return 1 if damaged else 0


def _show(path: Path, with_tensors: bool) -> int:
    from rich.console import Console
    from rich.table import Table

    from megatron_keye.checkpoint.overview import overview, tensor_groups

    one = overview(path)
    if one.manifest is None:
        raise CheckpointError(one.problems[0])
    manifest, console = one.manifest, Console()
    facts = Table(title=str(path), title_justify="left", show_header=False)
    facts.add_column()
    facts.add_column(overflow="fold")
    for name, value in {**_facts(manifest), "layout": one.layout or "converted or merged"}.items():
        facts.add_row(name, value)
    for name, value in sorted(manifest.model.items()):
        facts.add_row(f"model {name}", str(value))
    console.print(facts)
    groups = Table("module", "kind", "type", "tensors", "GB")
    for group in tensor_groups(manifest):
        groups.add_row(group.module, group.kind, group.dtype, str(group.num_tensors), f"{group.num_bytes / 1e9:,.3f}")
    console.print(groups)
    for problem in one.problems:
        console.print(f"damaged: {problem}", markup=False, soft_wrap=True)
    if with_tensors:
        _print_tensors(manifest)
    return 0


def _facts(manifest) -> dict[str, str]:
    run = manifest.run
    state = json.loads(run.resume_state) if run.resume_state.startswith("{") else {}
    place = {f"resume {name}": json.dumps(value) for name, value in state.items()}
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    ages = sorted(set(manifest.steps.values()))
    updates = " to ".join(map(str, dict.fromkeys((ages[0], ages[-1])))) if ages else "no optimizer state"
    return {"step": f"{run.step:,}", "updates of trained tensors": updates, "ledger": run.ledger or "none", "versions": versions, **place}


def _print_tensors(manifest) -> None:
    from math import prod

    from megatron_keye.checkpoint.files import DTYPES

    for key, record in manifest.tensors.items():
        kind, name = key.split("/", 1)
        print(f"{name}  {kind}  {record.dtype}  {list(record.shape)}  {prod(record.shape) * DTYPES[record.dtype].itemsize:,}")
