"""What a run writes about itself on its main rank: metrics, ledger, TensorBoard, and a line or bar for whoever watches."""

import math
import resource
import sys
import time
from dataclasses import astuple, dataclass
from statistics import fmean

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from megatron_keye.data.loader import loading_cost
from megatron_keye.plan.balance import imbalance
from megatron_keye.plan.ledger import Skipped
from megatron_keye.plan.types import ReplicaPlan
from megatron_keye.train.feed import FedStep
from megatron_keye.train.ledger import LedgerWriter
from megatron_keye.train.pace import Pace
from megatron_keye.train.placement import Planner
from megatron_keye.train.run_dir import JsonLines, RunDir
from megatron_keye.train.runtime import Runtime
from megatron_keye.train.step import StepResult

PHASES = ("data_wait", "encode", "route", "decoder", "encode_backward", "gradients", "optimizer")
LOADS = ("decoder_load", "vision_load")
"""What the planner goes by, FLOPs or measured times: of this rank's replica, and of what this rank encodes; NaN where it encodes
nothing, ever."""
PREDICTED = ("vision_predicted_s", "decoder_predicted_s")
"""By measured times: what this rank encodes, and the decoder of its replica; 0 without such times."""
MEDIA = ("media_remote", "media_local", "media_failed", "media_hedged")
"""As `MediaCounts`, of the step."""
COUNTS = ("tokens", "visual_tokens", "padding_tokens", "bytes_read", "loader_bytes", *MEDIA)
"""Of the replica, as its leader counts them; 0 on its other ranks."""
LOG_EVERY_S = 15.0


@dataclass(frozen=True)
class StepRecord:
    """A finished step, as the loop hands it over."""

    fed: FedStep
    skipped: list[Skipped]
    result: StepResult
    lr: float
    step_time_s: float
    dataset_samples: int


class Recorder:
    """Writes on the main rank; `record` is a collective, because all ranks' phase times and loads are compared."""

    def __init__(self, run_dir: RunDir, runtime: Runtime, planner: Planner, ledger: LedgerWriter | None, first_step: int, num_steps: int):
        """`ledger` is the main rank's; None elsewhere."""
        self._runtime, self._planner, self._ledger, self._num_steps = runtime, planner, ledger, num_steps
        self._metrics, self._validation = (JsonLines(p) for p in (run_dir.metrics, run_dir.validation))
        self._pace = Pace()
        self._board = self._progress = None
        self._last_log_s = -math.inf
        self._bytes_read = self._most_loader_bytes = 0
        if runtime.is_main:
            for lines in (self._metrics, self._validation):
                lines.keep_before(first_step)
            self._board = SummaryWriter(str(run_dir.tensorboard), purge_step=first_step)
            self._console = Console(stderr=True)
            if self._console.is_terminal:
                self._progress = _progress_bar(self._console)
                self._task = self._progress.add_task("training", total=num_steps, completed=first_step, note="")
                self._progress.start()

    def record(self, record: StepRecord) -> None:
        fed = record.fed
        values = {**record.result.phase_s, "data_wait": fed.wait_s, **self._loads(fed.share), **self._counts(fed)}
        names = (*PHASES, *LOADS, *PREDICTED, *COUNTS)
        mine = [values.get(name, 0.0) for name in names]
        mine = torch.tensor(mine, dtype=torch.float64, device=self._runtime.device)
        world = self._runtime.groups.world
        every = [torch.empty_like(mine) for _ in range(world.size())]
        dist.all_gather(every, mine, group=world)
        if self._runtime.is_main:
            columns = torch.stack(every, dim=1).tolist()
            self._write(record, dict(zip(names, columns, strict=True)))

    def say(self, message: str) -> None:
        """One line for people, from the main rank only."""
        if self._runtime.is_main:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def validated(self, num_steps: int, loss: float) -> None:
        """A validation loss after `num_steps` steps."""
        if self._runtime.is_main:
            last_step = num_steps - 1
            self._validation.keep_before(last_step)
            self._validation.append({"step": last_step, "loss": loss})
            self._board.add_scalar("valid/loss", loss, last_step)
            self.say(f"step {num_steps}/{self._num_steps}  validation loss {loss:.4f}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        if self._bytes_read:
            self.say(loading_cost(self._bytes_read, self._most_loader_bytes, self._runtime.groups.grid.replica_size))

    def _write(self, record: StepRecord, by_rank: dict[str, list[float]]) -> None:
        plan, result = record.fed.plan, record.result
        fields = {
            "step": plan.step, "loss": result.loss, "grad_norm": result.grad_norm, "lr": record.lr, "updated": result.updated,
            "samples": len(plan.members), "skipped_samples": len(record.skipped),
            "supervised_tokens": record.fed.batch.num_supervised, **{name: int(sum(by_rank[name])) for name in COUNTS},
            "step_time_s": round(record.step_time_s, 5),
            **{f"{name}_s": round(fmean(by_rank[name]), 5) for name in PHASES},
            **_balance(by_rank), **self._pace.observe(by_rank), "memory_bytes": _memory_bytes(self._runtime.device),
            "epoch": record.fed.after.position / record.dataset_samples,
        }  # fmt: skip
        fields["tokens_per_s"] = round(fields["tokens"] / record.step_time_s, 1)
        self._bytes_read += fields["bytes_read"]
        self._most_loader_bytes = max(self._most_loader_bytes, fields["loader_bytes"])
        self._metrics.append(fields)
        self._ledger.step(plan, record.fed.after, record.skipped, result.updated)
        for name, value in fields.items():
            if name not in ("step", "updated"):
                self._board.add_scalar(f"train/{name}", value, plan.step)
        for remark in self._pace.remarks():
            self.say(f"step {plan.step + 1}: {remark}")
        self._remark(record)
        self._show(fields)

    def _remark(self, record: StepRecord) -> None:
        """Say what somebody should look into."""
        done = record.fed.plan.step + 1
        for sample in record.skipped:
            self.say(f"step {done}: left out {sample.id}: {sample.reason}")
        if not math.isfinite(record.result.grad_norm):
            self.say(f"step {done}: the gradient is not finite, so no weight was changed")

    def _loads(self, share: ReplicaPlan) -> dict[str, float]:
        """What the planner's own function says of this rank."""
        loads = self._planner.loads([share])
        vision = dict(zip(self._planner.encoders, loads.vision[0], strict=True))
        rank = self._runtime.groups.replica_rank
        predicted = (loads.decoder[0], vision.get(rank, math.nan), *self._planner.predicted_s(share, rank))
        return dict(zip((*LOADS, *PREDICTED), predicted, strict=True))

    def _counts(self, fed: FedStep) -> dict[str, int]:
        if not self._runtime.groups.is_leader:
            return {}
        share = fed.share
        shapes = [document.shape for row in share.rows for document in row.documents]
        tokens = sum(shape.num_tokens for shape in shapes)
        padding = sum(row.num_tokens for row in share.rows) - tokens
        visual = sum(shape.num_visual_tokens for shape in shapes)
        return dict(zip(COUNTS, (tokens, visual, padding, fed.bytes_read, fed.loader_bytes, *astuple(fed.media)), strict=True))

    def _show(self, fields: dict) -> None:
        done = fields["step"] + 1
        note = f"loss {fields['loss']:.4f}  lr {fields['lr']:.2e}  {fields['tokens_per_s']:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._last_log_s > LOG_EVERY_S or done == self._num_steps:
            self._last_log_s = time.monotonic()
            self.say(f"step {done}/{self._num_steps}  {note}")


def _balance(by_rank: dict[str, list[float]]) -> dict[str, float]:
    """max / mean over ranks: predicted by the planner, and as it came out."""
    encode = [forward + backward for forward, backward in zip(by_rank["encode"], by_rank["encode_backward"], strict=True)]
    of = {
        "decoder_imbalance_predicted": by_rank["decoder_load"],
        "vision_imbalance_predicted": [load for load in by_rank["vision_load"] if not math.isnan(load)],
        "decoder_imbalance_measured": by_rank["decoder"],
        "vision_imbalance_measured": encode,
    }
    return {name: round(imbalance(loads), 4) for name, loads in of.items()}


def _memory_bytes(device: torch.device) -> int:
    """Peak so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _progress_bar(console: Console) -> Progress:
    columns = (BarColumn(bar_width=12), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
