"""From a cursor to the samples of its step, when steps are planned several batches at a time.

Positions of the order stream into windows, and each window is divided into steps. Samples taken are thus all those of the
complete windows and some of the open one. A cursor says this by stretches: runs of steps under the same settings since the last
moment at which exactly the first n positions of the order had been taken. Everything else is worked out anew.

When the settings change in mid-window, a new stretch begins: what its predecessor's open window has left comes first in its
stream, in order, so that every position is still taken exactly once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.lookahead import Lookahead, divide_window
from megatron_keye.plan.order import Order

WindowCosts = Callable[[np.ndarray, CostModel], np.ndarray]
"""(samples int64 [n], frozen coefficients) -> their costs, int64 [n]."""

CACHED_WINDOWS = 4


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps taken one after another with the same settings."""

    steps: int
    global_batch_samples: int
    lookahead: Lookahead

    @property
    def window_samples(self) -> int:
        return self.lookahead.batches * self.global_batch_samples

    @property
    def samples(self) -> int:
        return self.steps * self.global_batch_samples


@dataclass(frozen=True, slots=True)
class Progress:
    """Samples taken: `position` of them, the last ones by `stretches`. Without stretches, exactly the first `position` of the order."""

    position: int = 0
    stretches: tuple[Stretch, ...] = ()

    @property
    def base(self) -> int:
        """Where the first stretch began: all positions before are taken, and none after it otherwise."""
        return self.position - sum(stretch.samples for stretch in self.stretches)

    @property
    def frontier(self) -> int:
        """The first position that no window has drawn: an order may change from there on."""
        return self.position + num_left(self.stretches)

    def under(self, global_batch_samples: int, lookahead: Lookahead) -> "Progress":
        """The same progress, ready for a step with these settings."""
        stretches = self.stretches
        if not stretches or replace(stretches[-1], steps=0) != Stretch(0, global_batch_samples, lookahead):
            stretches += (Stretch(0, global_batch_samples, lookahead),)
        return Progress(self.position, stretches)

    def after_step(self) -> "Progress":
        """One step further in the last stretch. Stretches go once nothing is left over from any window."""
        last = replace(self.stretches[-1], steps=self.stretches[-1].steps + 1)
        stretches = (*self.stretches[:-1], last)
        position = self.position + last.global_batch_samples
        return Progress(position, stretches if num_left(stretches) else ())


def num_left(stretches: tuple[Stretch, ...]) -> int:
    """Positions before the frontier that no step has taken after these stretches."""
    left = 0
    for stretch in stretches:
        left = max(left, _drawn(stretch)) - stretch.samples
    return left


def _drawn(stretch: Stretch) -> int:
    """Samples of a stretch's stream in the windows that it has opened."""
    return -(-stretch.steps // stretch.lookahead.batches) * stretch.window_samples


class Membership:
    """The positions of steps. Keeps the windows in use, so that a window is divided once and not once a step."""

    def __init__(self, order: Order, costs: WindowCosts):
        self._order, self._costs = order, costs
        self._window = lru_cache(CACHED_WINDOWS)(self._divide)

    def positions(self, progress: Progress) -> np.ndarray:
        """int64 [batch]: the positions that the next step of the last stretch takes, in stream order."""
        *before, last = progress.stretches
        window, step = divmod(last.steps, last.lookahead.batches)
        positions, steps = self._window(progress.base, tuple(before), replace(last, steps=0), window)
        return positions[steps == step]

    def _divide(self, base: int, before: tuple[Stretch, ...], stretch: Stretch, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of a stretch's window, int64 [n] in stream order, and the step within the window that takes each."""
        carried, frontier = self._left_over(base, before)
        first = window * stretch.window_samples
        carried = carried[first:]
        frontier += max(0, first - num_left(before))
        fresh = max(0, stretch.window_samples - len(carried))
        positions = np.concatenate([carried[: stretch.window_samples], np.arange(frontier, frontier + fresh)])
        if stretch.lookahead.batches == 1:
            return positions, np.zeros(len(positions), np.int64)
        costs = self._costs(self._order(positions), stretch.lookahead.cost)
        return positions, divide_window(costs, stretch.lookahead, f"window at position {positions[0]}".encode())

    def _left_over(self, base: int, stretches: tuple[Stretch, ...]) -> tuple[np.ndarray, int]:
        """What these stretches left of the positions before the frontier, int64 [n] in stream order, and the frontier."""
        if not stretches:
            return np.zeros(0, np.int64), base
        *before, last = stretches
        carried, frontier = self._left_over(base, tuple(before))
        num_carried = len(carried)
        window, step = divmod(last.steps, last.lookahead.batches)
        left = carried[_drawn(last) :]
        if step:
            positions, steps = self._window(base, tuple(before), replace(last, steps=0), window)
            left = np.concatenate([positions[steps >= step], left])
        return left, frontier + max(0, _drawn(last) - num_carried)
