"""Which samples form which step, several global batches at a time, so that no step is much longer because of a few giant samples.

A giant is a sample dearer than a mean step is on one replica: its step waits for one replica, whatever the placement. So giants
of a window are put into the same steps, as many as keep all replicas busy while one replica has the largest.

Membership depends on the order, these settings and frozen costs alone, never on live ranks, speeds or calibration.
"""

from dataclasses import dataclass

import numpy as np

from megatron_keye.errors import PlanError
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.kernels import deal
from megatron_keye.plan.order import Permutation
from megatron_keye.plan.spread import common_scale


@dataclass(frozen=True, slots=True)
class Lookahead:
    """How windows of several global batches are divided into steps. One batch: each step takes the next samples of the order."""

    batches: int = 1
    canonical_replicas: int = 1
    """The replica count that steps are made for, whatever runs: the largest that the run may be scaled to."""
    growth_percent: int = 200
    """The most work in a step, in percent of the window's mean, unless single samples leave no choice."""
    cost: CostModel | None = None
    """Frozen costs: of the model's shapes, never calibrated ones. Not needed for one batch."""

    def __post_init__(self) -> None:
        sizes = ("batches", "canonical_replicas")
        problems = [f"{name} is {getattr(self, name)}, expected at least 1" for name in sizes if getattr(self, name) < 1]
        if self.growth_percent < 100:
            problems.append(f"growth_percent is {self.growth_percent}, expected at least 100")
        if self.batches > 1 and self.cost is None:
            problems.append("cost is missing, which several batches are divided by")
        if problems:
            raise PlanError("No window can be planned with these lookahead settings: " + "; ".join(problems) + ".")


ONE_BATCH = Lookahead()


def divide_window(costs: np.ndarray, lookahead: Lookahead, key: bytes) -> np.ndarray:
    """The step, 0 .. batches - 1, of each sample of a window, int64 [n]; `costs` int64 [n], n a multiple of the batches.

    Every step gets equally many. `key` mixes the order of the steps, so that giants do not come at the same place in each window.
    """
    batches = lookahead.batches
    if len(costs) % batches:
        raise PlanError(f"A window of {len(costs)} samples cannot be divided into {batches} equal batches.")
    (costs,) = common_scale(costs)
    steps = np.zeros(len(costs), np.int64)
    left = np.argsort(-costs, kind="stable")
    limit = int(costs.sum()) * lookahead.growth_percent // (100 * batches)
    numbers = Permutation(batches, b"steps of a window: " + key).of(np.arange(batches))
    step = 0
    while step < batches - 1:
        chosen = _giant_step(costs[left], batches - step, lookahead.canonical_replicas, limit)
        if chosen is None:
            break
        steps[left[chosen]] = numbers[step]
        left = np.delete(left, chosen)
        step += 1
    rest = np.zeros(len(costs), np.int64)
    num_even = batches - step
    places = np.full(num_even, len(costs) // batches, np.int64)
    deal(len(left) * num_even, left, costs, np.zeros(num_even, np.int64), places, rest)
    steps[left] = numbers[step + rest[left]]
    return steps


def _giant_step(costs: np.ndarray, steps_left: int, replicas: int, limit: int) -> np.ndarray | None:
    """Places in `costs`, which fall, of the samples of a step around the dearest; None where an even division leaves no giant.

    The step gets the dearest samples and, to fill its number, others from the whole range of the rest, up to what keeps all
    replicas busy while one has the dearest.
    """
    count = len(costs)
    batch, total = count // steps_left, int(costs.sum())
    if int(costs[0]) * replicas * steps_left <= total:
        return None
    level = min(int(costs[0]) * replicas, max(limit, total // steps_left))
    dearest = np.arange(1, batch + 1)
    sums = np.cumsum(costs[:batch])
    with_mean_others = sums + (batch - dearest) * ((total - sums) // (count - dearest))
    num_dearest = max(1, int(np.searchsorted(with_mean_others, level, side="right")))
    num_others = batch - num_dearest
    others = (2 * np.arange(num_others) + 1) * (count - num_dearest) // max(1, 2 * num_others)
    return np.concatenate([np.arange(num_dearest), num_dearest + others])
