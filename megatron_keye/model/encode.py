"""Phases 1 and 3 of a step: encode a replica's images on all of its ranks, and take their gradients back.

Forward, per round: patches -> visual rows on the encoding rank -> all-to-all within the replica -> the slab of rows that this
rank embeds. Backward, per round: slab gradients by the transposed exchange -> the gradient of the encoder's output -> weights.
Every rank of the replica runs every round, also those without a patch, so no collective is ever missed.

Shapes: R encoder output rows of one round, S slab rows of the step, H decoder hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_keye.contract.media import PatchGrid
from megatron_keye.plan.route import Exchange, StepRoute


@dataclass(frozen=True)
class EncodeRound:
    """What this rank encodes in one round: uint8 patches [num_patches, 588] of segments with `grids`, possibly none."""

    patches: Tensor
    grids: tuple[PatchGrid, ...]


class EncodePhases:
    """Runs `encoder` (patches, grids -> rows [R, H]) for one step after another.

    With `keep_graph`, activations of every round wait for their gradient; without, a round's forward runs again in phase 3.
    A frozen encoder (`trainable` False) builds no graph and exchanges no gradients. `lap` is told the end of each phase.
    """

    def __init__(
        self, encoder: Callable[[Tensor, Sequence[PatchGrid]], Tensor], replica: ProcessGroup, *,
        hidden_size: int, dtype: torch.dtype, trainable: bool, keep_graph: bool, lap: Callable[[str], None],
    ):  # fmt: skip
        self.encoder = encoder
        self.replica = replica
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.trainable = trainable
        self.keep_graph = keep_graph and trainable
        self.lap = lap
        self._outputs: list[Tensor] = []

    def forward(self, rounds: Sequence[EncodeRound], route: StepRoute, device: torch.device) -> Tensor:
        """All visual rows that this rank embeds in the step, [S, H], without a graph."""
        slab = torch.zeros((sum(route.slab_counts), self.hidden_size), dtype=self.dtype, device=device)
        self._outputs = []
        for inputs, exchange in zip(rounds, route.forward, strict=True):
            with torch.set_grad_enabled(self.keep_graph):
                rows = self.encoder(inputs.patches, inputs.grids)
            if self.keep_graph:
                self._outputs.append(rows)
            self.lap("encode")
            move_rows(rows.detach(), slab, exchange, self.replica)
            self.lap("route")
        return slab

    def backward(self, slab_gradient: Tensor, rounds: Sequence[EncodeRound], route: StepRoute) -> None:
        """Accumulate the encoder's weight gradients from the gradient of the slab [S, H]."""
        if not self.trainable:
            return
        for number, (inputs, exchange) in enumerate(zip(rounds, route.backward, strict=True)):
            if self.keep_graph:
                rows, self._outputs[number] = self._outputs[number], None
            else:
                rows = self.encoder(inputs.patches, inputs.grids)
            gradient = torch.zeros_like(rows)
            self.lap("encode_backward")
            move_rows(slab_gradient, gradient, exchange, self.replica)
            self.lap("route")
            if inputs.grids:
                torch.autograd.backward(rows, gradient)
            self.lap("encode_backward")
        self._outputs = []


def move_rows(source: Tensor, target: Tensor, exchange: Exchange, group: ProcessGroup) -> None:
    """Execute one exchange: add rows of `source` [*, H] of all ranks to rows of `target` [*, H] of all ranks, in place.

    Rows that meet at one place add up, as gradients must: one that a route returned twice would show in the result.
    """
    send_rows = torch.from_numpy(exchange.send_rows).to(source.device)
    receive_rows = torch.from_numpy(exchange.receive_rows).to(source.device)
    sent = source.index_select(0, send_rows)
    received = sent.new_empty((len(receive_rows), source.shape[1]))
    dist.all_to_all_single(received, sent, list(exchange.receive_counts), list(exchange.send_counts), group=group)
    target.index_add_(0, receive_rows, received)
