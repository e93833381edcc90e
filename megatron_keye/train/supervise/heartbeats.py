"""Which rank has stopped making progress, seen from its heartbeat file. Pure: texts and a clock go in.

Only the observer's clock counts, so that ranks whose clocks differ are not taken for dead ones. Each rank also watches itself
(`train/watchdog.py`); this second look finds those that cannot, such as the ranks of a frozen node.
"""

from collections.abc import Mapping
from dataclasses import dataclass

MARGIN_S = 15.0
"""The ranks' own watchdogs come first, since they also write stacks."""


@dataclass(frozen=True)
class Beat:
    """A rank's heartbeat: steps finished, and the phase that it is in."""

    step: int
    phase: str


def parse_beat(text: str) -> Beat | None:
    """The content of a heartbeat file, "step time phase"; None for anything else."""
    words = text.split()
    if len(words) != 3 or not words[0].isdigit():
        return None
    return Beat(int(words[0]), words[2])


class StallWatch:
    """Remembers when each rank's heartbeat last changed. Times are in seconds of the observer's monotonic clock."""

    def __init__(self, hang_s: float, slow_phase_s: float, now_s: float):
        self._hang_s, self._slow_phase_s = hang_s, slow_phase_s
        self._began_s = now_s
        self._seen: dict[str, tuple[str, float]] = {}
        self._longest_step_s: dict[str, float] = {}

    def look(self, texts: Mapping[str, str], now_s: float) -> list[str]:
        """Ranks by name that have made no progress for too long, given all heartbeat texts; an empty one while none has any."""
        for rank, text in texts.items():
            before, since_s = self._seen.get(rank, ("", now_s))
            if text != before:
                self._note_step(rank, parse_beat(before), parse_beat(text), now_s - since_s)
                self._seen[rank] = (text, now_s)
        if not self._seen:
            return ["no rank"] if now_s - self._began_s > self._slow_phase_s + MARGIN_S else []
        return [rank for rank, (text, since_s) in self._seen.items() if now_s - since_s > self._limit_s(rank, text) + MARGIN_S]

    def _note_step(self, rank: str, before: Beat | None, after: Beat | None, took_s: float) -> None:
        if before and after and before.phase == "step" and after.step > before.step:
            per_step_s = took_s / (after.step - before.step)
            self._longest_step_s[rank] = max(self._longest_step_s.get(rank, 0.0), per_step_s)

    def _limit_s(self, rank: str, text: str) -> float:
        beat = parse_beat(text)
        longest_s = self._longest_step_s.get(rank)
        if beat is None or beat.phase != "step" or longest_s is None:
            return self._slow_phase_s
        return max(self._hang_s, 3 * longest_s)
