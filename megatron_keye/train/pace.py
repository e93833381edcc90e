"""Watches the latest steps of a run: do measured times still hold, and is a rank slow? It only tells; placement does not change."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from megatron_keye.plan.pace import drift, rank_speeds
from megatron_keye.plan.spread import SPEED_BASE

WINDOW_STEPS = 50
FEWEST_STEPS = 10
"""Before anything is remarked."""
DRIFT_LIMIT = 1.25
SLOW_SPEED = 800
_PARTS = {"vision": "the ViT", "decoder": "the decoder"}


class Pace:
    """The times of the latest steps by rank, as `Recorder` gathers them."""

    def __init__(self):
        self._steps: deque[dict[str, np.ndarray]] = deque(maxlen=WINDOW_STEPS)
        self._fields: dict[str, float] = {}
        self._remarked: set[str] = set()

    def observe(self, by_rank: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Takes a step's values by rank and returns what goes to the metrics: the slowest rank and its speed per mille and, where
        times were measured, measured over predicted time."""
        column = {name: np.array(values, np.float64) for name, values in by_rank.items()}
        self._steps.append({
            "vision": column["encode"] + column["encode_backward"], "decoder": column["decoder"],
            "vision_predicted": column["vision_predicted_s"], "decoder_predicted": column["decoder_predicted_s"],
            "vision_load": np.nan_to_num(column["vision_load"]),
        })  # fmt: skip
        speeds = rank_speeds(self._window("vision"), self._window("vision_load"))
        slowest = int(np.argmin(speeds))
        drifts = {f"{part}_drift": drift(self._window(part), self._window(f"{part}_predicted")) for part in _PARTS}
        known = {name: round(value, 4) for name, value in drifts.items() if not math.isnan(value)}
        self._fields = {**known, "slowest_rank": slowest, "slowest_rank_speed": speeds[slowest]}
        return self._fields

    def remarks(self) -> Iterator[str]:
        """Sentences about what passed a limit with the latest step."""
        if len(self._steps) < FEWEST_STEPS:
            return
        for part, name in _PARTS.items():
            value = self._fields.get(f"{part}_drift", 1.0)
            if self._begins(part, not 1 / DRIFT_LIMIT <= value <= DRIFT_LIMIT):
                yield f"{name} takes {value:.2f} times as long as data.cost_file says: run `keye calibrate` again between two starts"
        rank, speed = self._fields["slowest_rank"], self._fields["slowest_rank_speed"]
        if self._begins(f"rank {rank}", speed <= SLOW_SPEED):
            yield f"rank {rank} encodes at {speed / SPEED_BASE:.0%} of the usual speed: look at its host"

    def _begins(self, what: str, holds: bool) -> bool:
        """Whether this holds and did not before."""
        begins = holds and what not in self._remarked
        (self._remarked.add if holds else self._remarked.discard)(what)
        return begins

    def _window(self, name: str) -> np.ndarray:
        return np.stack([step[name] for step in self._steps])
