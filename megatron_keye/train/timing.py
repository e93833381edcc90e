"""Wall-clock time of a step's phases on this rank."""

import time
from collections.abc import Callable

import torch

Clock = Callable[[], float]
"""Seconds since some moment: `time.perf_counter`, or `time.process_time` where other processes must not count."""


class PhaseTimer:
    """`start`, then `lap(name)` at the end of each phase; on a GPU a lap waits for the work that the phase queued."""

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter):
        self.device, self._clock = device, clock
        self._laps: dict[str, float] = {}
        self._last_s = 0.0

    def start(self) -> None:
        self._laps = {}
        self._last_s = self._now_s()

    def lap(self, name: str) -> None:
        now_s = self._now_s()
        self._laps[name] = self._laps.get(name, 0.0) + now_s - self._last_s
        self._last_s = now_s

    def laps(self) -> dict[str, float]:
        return dict(self._laps)

    def _now_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()
