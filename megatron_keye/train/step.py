"""The training step, in three phases.

1. Encode: every rank of a replica turns its share of the step's images into visual rows, which travel to the ranks that
   embed them.
2. Decode: Megatron's pipeline schedule runs the decoder; the visual rows enter as leaves that collect their gradient.
3. Encode backward: those gradients travel back, and the ViT's weight gradients are reduced once, explicitly.

Then one division by the global number of supervised tokens, one gradient norm over all modules, and the optimizer. Nothing
here branches on the layout, the modality or what is frozen: a text-only step carries empty tensors, and what is frozen was
decided when the model was built.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_keye.model.encode import EncodePhases
from megatron_keye.objective.cross_entropy import token_nll
from megatron_keye.train.batch import Microbatch, StepBatch
from megatron_keye.train.build import KeyeModel, build_schedule
from megatron_keye.train.timing import Clock, PhaseTimer


@dataclass(frozen=True)
class StepResult:
    """What one step did. `loss` is the mean over supervised tokens of the world, the same on all ranks; `updated` is False
    where a gradient was not finite or no token was supervised."""

    loss: float
    grad_norm: float
    updated: bool
    phase_s: dict[str, float] = field(default_factory=dict)


class TrainStep:
    """Runs steps on this rank's part of `model`; all ranks must call the same methods in the same order."""

    def __init__(self, model: KeyeModel, optimizer: ChainedOptimizer | None, clock: Clock = time.perf_counter):
        self.model = model
        self.optimizer = optimizer
        self.schedule = build_schedule(model)
        self.timer = PhaseTimer(model.device, clock)
        config = model.config
        self.encode = EncodePhases(
            model.encoder_ddp or model.encoder, model.groups.replica, hidden_size=config.model.decoder.hidden_size,
            dtype=model.dtype, trainable=model.encoder_ddp is not None, keep_graph=config.encode.activations == "keep",
            lap=self.timer.lap,
        )  # fmt: skip
        transformer = model.chunks[0].config
        transformer.finalize_model_grads_func = self._finalize
        transformer.no_sync_func = _no_sync_functions(model)

    def run(self, batch: StepBatch, lr_factor: float) -> StepResult:
        """One whole step; `lr_factor` scales every parameter group's own peak learning rate."""
        loss = self.accumulate(batch)
        grad_norm, updated = self.update(lr_factor, batch.num_supervised)
        self.timer.lap("optimizer")
        return StepResult(loss, grad_norm, updated, self.timer.laps())

    def accumulate(self, batch: StepBatch) -> float:
        """Forward and backward of a step: leaves complete, divided gradients behind and returns the loss."""
        self.timer.start()
        for module in (*self.model.chunks_ddp, *self._encoder_ddp()):
            module.zero_grad_buffer()
        self.timer.lap("gradients")
        slab = self.encode.forward(batch.rounds, batch.route, self.model.device)
        leaves = [part.requires_grad_(self.encode.trainable) for part in slab.split(list(batch.route.slab_counts))]
        loss_sum = self._decode(batch, leaves, forward_only=False)
        self.timer.lap("decoder")
        self._encode_backward(batch, leaves)
        self.timer.lap("gradients")
        self._divide(max(batch.num_supervised, 1))
        return self._global_loss(loss_sum, batch.num_supervised)

    @torch.no_grad()
    def evaluate(self, batch: StepBatch) -> float:
        """The loss of a batch, without gradients."""
        slab = self.encode.forward(batch.rounds, batch.route, self.model.device)
        leaves = list(slab.split(list(batch.route.slab_counts)))
        return self._global_loss(self._decode(batch, leaves, forward_only=True), batch.num_supervised)

    @torch.no_grad()
    def update(self, lr_factor: float, num_supervised: int) -> tuple[float, bool]:
        """Clip and apply the gradients; returns their norm and whether weights moved. All ranks decide alike, since the norm is
        a sum over all of them: one that is not finite anywhere is not finite everywhere."""
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm) or num_supervised == 0:
            return grad_norm, False
        settings = self.model.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = group["max_lr"] * lr_factor
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        for part in self.optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=settings.clip_norm, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()
        return grad_norm, True

    def _decode(self, batch: StepBatch, leaves: list[Tensor], forward_only: bool) -> Tensor:
        """Phase 2. Returns this rank's loss sum, float64: zero except on one TP rank of the last stage."""
        microbatches = list(zip(batch.microbatches, leaves, strict=True))
        reports = self.schedule(
            forward_step_func=self._forward_microbatch,
            data_iterator=[iter(microbatches) for _ in self.model.schedule_models],
            model=self.model.schedule_models,
            num_microbatches=len(microbatches),
            seq_length=self.model.config.data.seq_length_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        if self.model.groups.is_last_stage and self.model.groups.coordinate("tp") == 0:
            for report in reports:
                total += report["loss_sum"]
        return total

    def _forward_microbatch(self, microbatches: Iterator[tuple[Microbatch, Tensor]], chunk):
        """Megatron's forward-step function: the chunk's output, and how to turn it into a loss sum on the last stage."""
        microbatch, leaf = next(microbatches)
        output = chunk(microbatch.token_ids, leaf, microbatch.visual_places, microbatch.row)

        def loss_of(logits_1TV: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            vocab_size = self.model.config.model.decoder.vocab_size
            nll = token_nll(logits_1TV.squeeze(0), microbatch.labels, vocab_size, self.model.groups.tp)
            loss_sum = (nll * microbatch.weights).sum()
            return loss_sum, microbatch.weights.sum().int(), {"loss_sum": loss_sum.detach().double()}

        return output, loss_of

    def _encode_backward(self, batch: StepBatch, leaves: list[Tensor]) -> None:
        """Phase 3."""
        if not self.encode.trainable:
            return
        gradients = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
        self.encode.backward(torch.cat(gradients), batch.rounds, batch.route)
        self.model.encoder_ddp.finish_grad_sync()

    def _finalize(self, chunks, num_tokens, *, pg_collection, force_all_reduce=False) -> None:
        """Called by the schedule: reduce the decoder's gradients as sums. The division comes once, in `_divide`; Megatron's
        own, by a float32 reciprocal, would differ between layouts by 1e-8. Replicas wait for each other here, which is none of the
        decoder's own time."""
        self.timer.lap("decoder")
        if self.model.chunks_ddp:
            finalize_model_grads(chunks, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
        self.timer.lap("gradients")

    def _divide(self, num_supervised: int) -> None:
        for module in (*self.model.chunks_ddp, *self._encoder_ddp()):
            module.scale_gradients(1.0 / num_supervised)

    def _encoder_ddp(self) -> tuple:
        return () if self.model.encoder_ddp is None else (self.model.encoder_ddp,)

    def _global_loss(self, loss_sum: Tensor, num_supervised: int) -> float:
        dist.all_reduce(loss_sum, group=self.model.groups.world)
        return float(loss_sum) / max(num_supervised, 1)


def _no_sync_functions(model: KeyeModel):
    """What the schedules want: one function for one chunk, a list for several, None where nothing is reduced."""
    functions = [chunk.no_sync for chunk in model.chunks_ddp]
    if not functions:
        return None
    return functions if len(functions) > 1 else functions[0]
