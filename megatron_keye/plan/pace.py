"""Measured against predicted times of some steps: whether the time model still holds, and which ranks are slow.

Arrays are float64 [steps, ranks]. A rank without work in a step has a predicted time of 0 there and is left out.
"""

import numpy as np

from megatron_keye.plan.spread import SPEED_BASE

SPEED_STEP = 50
"""Speeds are told in multiples of this, so that noise does not change them."""
LEAST_SHARE = 0.5
"""Of the median rank's work: in a step with less, a rank's time says more of what is not in the prediction."""
LEAST_SPEED, GREATEST_SPEED = 250, 2000


def drift(measured: np.ndarray, predicted: np.ndarray) -> float:
    """Measured over predicted time: the median over steps of the ratio of sums over ranks; nan where no step had work."""
    busy = predicted > 0
    sums = np.where(busy, measured, 0.0).sum(axis=1), np.where(busy, predicted, 0.0).sum(axis=1)
    steps = sums[1] > 0
    return float(np.median(sums[0][steps] / sums[1][steps])) if steps.any() else float("nan")


def rank_speeds(measured: np.ndarray, predicted: np.ndarray) -> tuple[int, ...]:
    """How fast each rank is, per mille of the median rank: the median over its steps with enough work, quantized; 1000 without any.

    The unit of `predicted` does not matter.
    """
    relative = np.array([_relative_rates(*step) for step in zip(measured, predicted, strict=True)])
    speeds = []
    for rank in range(measured.shape[1]):
        known = relative[~np.isnan(relative[:, rank]), rank]
        speed = SPEED_BASE * float(np.median(known)) if len(known) else SPEED_BASE
        quantized = round(speed / SPEED_STEP) * SPEED_STEP
        speeds.append(min(max(quantized, LEAST_SPEED), GREATEST_SPEED))
    return tuple(speeds)


def _relative_rates(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Work per time in one step, relative to the median rank, float64 [ranks]; nan where a rank had too little work to tell."""
    rates = np.full(len(measured), np.nan)
    busy = (predicted > 0) & (measured > 0)
    if busy.any():
        busy &= predicted >= LEAST_SHARE * np.median(predicted[busy])
        rates[busy] = predicted[busy] / measured[busy]
        rates /= np.median(rates[busy])
    return rates
