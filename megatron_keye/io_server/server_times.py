"""How long results take, by server: when to ask a second one as well, and which is too slow to be asked."""

import statistics
import threading
from collections import defaultdict, deque

import numpy as np

from megatron_keye.io_server.protocol import DecodeJob

HEDGED_SHARE = 0.1
"""Requests that may be hedged, at most, in the long run."""
HEDGE_PERCENTILE = 95
HISTORY = 128
"""Results of all servers that are remembered, of images and of videos."""
WINDOW = 8
"""The same of each server; fewer say nothing."""
SLOW_TIMES = 3.0
"""A server that takes so many times as long as another is slow."""


class ServerTimes:
    """Times are per byte of the result. Images and videos are told apart, as a byte of one costs many times a byte of the other.

    All methods may be called from several threads.
    """

    def __init__(self, patience_s: float):
        """Nothing is late, and no server slow, within `patience_s`."""
        self._patience_s = patience_s
        self._all: dict[bool, deque[float]] = {False: deque(maxlen=HISTORY), True: deque(maxlen=HISTORY)}
        self._recent: dict[bool, defaultdict[str, deque[float]]] = {
            is_video: defaultdict(lambda: deque(maxlen=WINDOW)) for is_video in (False, True)
        }
        self._allowance = 1.0
        self._lock = threading.Lock()

    def hedge_after_s(self, job: DecodeJob) -> float:
        """When a second server is asked: after what nearly all results of this size took."""
        with self._lock:
            history = self._all[job.frames is not None]
            if len(history) < WINDOW:
                return self._patience_s
            return max(self._patience_s, float(np.percentile(history, HEDGE_PERCENTILE)) * job.result_bytes)

    def may_hedge(self) -> bool:
        """Takes one hedge from the allowance where there is one."""
        with self._lock:
            if self._allowance < 1:
                return False
            self._allowance -= 1
            return True

    def answered(self, url: str, job: DecodeJob, took_s: float) -> None:
        with self._lock:
            self._all[job.frames is not None].append(took_s / job.result_bytes)
            self._recent[job.frames is not None][url].append(took_s / job.result_bytes)
            self._allowance = min(self._allowance + HEDGED_SHARE, HISTORY * HEDGED_SHARE)

    def overtaken(self, url: str, job: DecodeJob, after_s: float) -> None:
        """Another server answered; this one would have taken longer than `after_s`."""
        with self._lock:
            self._recent[job.frames is not None][url].append(after_s / job.result_bytes)

    def is_slow(self, url: str, job: DecodeJob, took_s: float) -> bool:
        """Whether this result came late, and the server's last ones took several times as long as those of another server."""
        if took_s < self._patience_s:
            return False
        with self._lock:
            medians = {
                server: statistics.median(times) for server, times in self._recent[job.frames is not None].items() if len(times) == WINDOW
            }
        own = medians.pop(url, 0.0)
        return bool(medians) and own > SLOW_TIMES * min(medians.values())
