"""Requests to a running job: STOP and SAVE files, SIGTERM and SIGUSR1. All ranks see them at the same step."""

import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_keye.parallel.groups import Groups
from megatron_keye.train.run_dir import RunDir

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Requests:
    stop: bool
    save: bool


class Control:
    """Collects requests on every rank; `poll` makes them everybody's.

    Made when the run starts: from then on signals are requests, and a STOP file that lay there already was meant for an earlier start.
    """

    def __init__(self, run_dir: RunDir, groups: Groups, device: torch.device):
        self._run_dir, self._groups, self._device = run_dir, groups, device
        self._signalled = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        if groups.rank == 0:
            run_dir.answer("STOP")

    def _on_signal(self, number: int, frame) -> None:
        self._signalled = True

    def poll(self) -> Requests:
        """What any rank was asked for; a collective over the world, for step boundaries and long loops."""
        asked = [self._signalled, False]
        if self._groups.rank == 0:
            asked = [self._signalled or self._run_dir.is_asked("STOP"), self._run_dir.is_asked("SAVE")]
        flags = torch.tensor([int(flag) for flag in asked], device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._groups.world)
        return Requests(stop=bool(flags[0]), save=bool(flags[1]))
