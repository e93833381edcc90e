"""A rank that stops making progress writes the stacks of all its threads and ends, so that its launcher can start again.

The clock is a C thread of `faulthandler`: it fires whatever Python or a collective is doing.
"""

import faulthandler
import time
from pathlib import Path

from megatron_keye.config.schema import TrainConfig

STEPS_PER_LIMIT = 3
"""A step that takes this many times the longest one so far has hung."""


class Watchdog:
    """`beat` at every sign of progress. Stacks go to `path`, which stays empty while all is well."""

    def __init__(self, path: Path, config: TrainConfig):
        self._hang_s, self._slow_phase_s = config.hang_timeout_s, config.slow_phase_timeout_s
        self._longest_step_s: float | None = None
        self._phase, self._step, self._since_s = "", 0, 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        faulthandler.enable(self._file)

    def beat(self, step: int, phase: str) -> None:
        """The rank begins `phase` after `step` finished steps, and has until the limit of that phase to say something again."""
        now_s = time.monotonic()
        if self._phase == "step" and step > self._step:
            self._longest_step_s = max(self._longest_step_s or 0.0, now_s - self._since_s)
        self._phase, self._step, self._since_s = phase, step, now_s
        faulthandler.dump_traceback_later(self.limit_s(), exit=True, file=self._file)

    def limit_s(self) -> float:
        """The first step of a start warms everything up, and saving and loading are as slow as the file system."""
        if self._phase != "step" or self._longest_step_s is None:
            return self._slow_phase_s
        return max(self._hang_s, STEPS_PER_LIMIT * self._longest_step_s)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        self._file.close()
