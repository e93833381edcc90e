"""Requests to a running job: STOP and SAVE files, signals, a launcher that is gone. All ranks see them at the same step."""

import os
import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_keye.parallel.groups import Groups
from megatron_keye.train.run_dir import RunDir

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHED = "TORCHELASTIC_RUN_ID"
"""In the environment of ranks that torchrun started; it does not take them along when it is killed."""


@dataclass(frozen=True)
class Requests:
    stop: bool
    save: bool
    due: bool
    """On some rank's clock, the time for a checkpoint has come."""
    writing: bool
    """Some rank still writes its part of the last one."""


class Control:
    """Collects requests on every rank; `poll` makes them everybody's.

    Made when the run starts: from then on signals are requests, and a STOP file that lay there already was meant for an earlier start.
    """

    def __init__(self, run_dir: RunDir, groups: Groups, device: torch.device):
        self._run_dir, self._groups, self._device = run_dir, groups, device
        self._signalled = False
        self._launcher = os.getppid() if LAUNCHED in os.environ else None
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        if groups.rank == 0:
            run_dir.answer("STOP")

    def _on_signal(self, number: int, frame) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            # Whoever presses Ctrl-C again will not wait for a checkpoint.
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def poll(self, due: bool = False, writing: bool = False) -> Requests:
        """What any rank was asked for, and whether any says `due` or `writing`; a collective over the world, for step boundaries and
        long loops."""
        stop, save = self._signalled or self._is_orphan(), False
        if self._groups.rank == 0:
            stop, save = stop or self._run_dir.is_asked("STOP"), self._run_dir.is_asked("SAVE")
        flags = torch.tensor([stop, save, due, writing], dtype=torch.int32, device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._groups.world)
        return Requests(*map(bool, flags.tolist()))

    def _is_orphan(self) -> bool:
        return self._launcher is not None and os.getppid() != self._launcher
