"""Saving and loading checkpoints against torch.distributed.checkpoint (DCP), on the same tensors, and what training waits for a save.

    python -m benchmarks.checkpoint --folder /data/scratch --ranks 2 --mib 512

Each rank (gloo, on this machine) holds float32 tensors of 16 MiB, as many as make `--mib`. In each round, in turn: ours and DCP, saving
(flushed to disk), loading, and beginning a save in the background. Ours computes checksums while saving and compares them before
loading; DCP has none. Loads come out of the page cache. Needs a few times ranks x MiB on disk and in memory; removes everything.
"""

import argparse
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch import nn

from megatron_keye.checkpoint.background import BackgroundSave
from megatron_keye.checkpoint.host_copies import HostCopies
from megatron_keye.checkpoint.load import load_checkpoint
from megatron_keye.checkpoint.manifest import RunRecord
from megatron_keye.checkpoint.state import LocalParameter, TrainingState
from megatron_keye.checkpoint.store import Keep, save_checkpoint
from megatron_keye.model.names import encoder_pieces
from megatron_keye.parallel.launch import run_ranks

SIDE = 2048
"""16 MiB in float32."""
TIMEOUT_S = 3600.0
Measured = tuple[float, float]
"""Seconds until the last rank is done, and CPU seconds of all ranks."""


def make_tensors(num_tensors: int) -> dict[str, torch.Tensor]:
    """This rank's own; random, so that nothing compresses."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return {f"visual.{dist.get_rank()}.{n}": torch.rand(SIDE, SIDE, generator=generator) for n in range(num_tensors)}


def as_state(tensors: dict[str, torch.Tensor]) -> TrainingState:
    local = []
    for name, tensor in tensors.items():
        pieces = tuple(encoder_pieces({name: torch.empty(tensor.shape, device="meta")}))
        local.append(LocalParameter(nn.Parameter(tensor, requires_grad=False), pieces, 0, 1, saves_whole=True))
    return TrainingState(tuple(local), (), (), dist.group.WORLD)


def measured(work: Callable[[], object]) -> Measured:
    """Of `work` on all ranks at once; what is still to be written is on disk before it begins."""
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    work()
    cpu_s = torch.tensor([time.process_time() - began_cpu_s])
    took_s = torch.tensor([time.perf_counter() - began_s])
    dist.all_reduce(took_s, op=dist.ReduceOp.MAX)
    dist.all_reduce(cpu_s)
    return float(took_s), float(cpu_s)


def one_round(folder: Path, tensors: dict[str, torch.Tensor], others: dist.ProcessGroup) -> dict[str, Measured]:
    """Everything once, and beginning a save of ours twice: the second finds the memory of the first. (DCP's staging memory is kept only
    where it is pinned for a GPU.) The folder is empty before and after. `others` is a group for DCP's thread, which has collectives."""
    state, empty = as_state(tensors), {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    record = RunRecord(1, "", "", "", {})
    found = {}
    found["save, ours"] = measured(lambda: save_checkpoint(folder / "ours", state, record, {}, Keep(1)))
    found["save, DCP"] = measured(lambda: dcp.save(dict(tensors), checkpoint_id=folder / "dcp"))
    target = as_state(empty)
    found["load, ours"] = measured(lambda: load_checkpoint(folder / "ours/step_00000001", target, {}))
    require_equal(tensors, empty)
    for tensor in empty.values():
        tensor.zero_()
    found["load, DCP"] = measured(lambda: dcp.load(empty, checkpoint_id=folder / "dcp"))
    require_equal(tensors, empty)
    copies = HostCopies()

    def begin() -> None:
        begun.append(BackgroundSave(folder / "later", state, record, {}, Keep(1), copies))

    begun = []
    for which in ("begin", "begin again"):
        found[f"{which}, ours"] = measured(begin)
        begun.pop().finish()
    found["begin, DCP"] = measured(
        lambda: begun.append(dcp.async_save(dict(tensors), checkpoint_id=folder / "dcp_later", process_group=others))
    )
    begun.pop().result()
    dist.barrier()
    if dist.get_rank() == 0:
        for path in folder.iterdir():
            shutil.rmtree(path)
    dist.barrier()
    return found


def require_equal(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def rounds(folder: Path, num_tensors: int, repeats: int) -> list[dict[str, Measured]]:
    warnings.simplefilter("ignore")
    tensors = make_tensors(num_tensors)
    others = dist.new_group()
    return [one_round(folder, tensors, others) for _ in range(repeats)]


def show(results: list[dict[str, Measured]], num_bytes: int) -> None:
    """`begin` is what training waits for a save in the background. Medians over rounds, and the median of the ratios within each round."""
    load = ", ".join(f"{value:.0f}" for value in os.getloadavg())
    title = f"{num_bytes / 1e9:.2f} GB in all, {os.cpu_count()} cores, load {load}"
    table = Table("", "s", "CPU s", "time, of our save", "CPU, of DCP", title=title, title_justify="left")
    for name in results[0]:
        seconds, cpu_s = (statistics.median(values) for values in zip(*(result[name] for result in results), strict=True))
        of_save = statistics.median(result[name][0] / result["save, ours"][0] for result in results)
        other = name.replace("ours", "DCP").replace(" again", "")
        of_dcp = statistics.median(result[name][1] / result[other][1] for result in results)
        table.add_row(name, f"{seconds:.2f}", f"{cpu_s:.2f}", f"{of_save:.2f}", f"{of_dcp:.2f}")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("checkpoint_benchmark"), help="is made and removed (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mib", type=int, default=512, help="of each rank (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    num_tensors = max(1, arguments.mib * (1 << 20) // (SIDE * SIDE * 4))
    arguments.folder.mkdir(parents=True)
    try:
        results = run_ranks(
            arguments.ranks, rounds, arguments.folder, num_tensors, arguments.repeats, prepare=lambda: None, timeout_s=TIMEOUT_S
        )
    finally:
        shutil.rmtree(arguments.folder)
    show(results[0], arguments.ranks * num_tensors * SIDE * SIDE * 4)


if __name__ == "__main__":
    main()
