"""Trying again what a network may refuse for a moment: with pauses that grow, and that differ between processes."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

MAX_PAUSE_S = 30.0
Result = TypeVar("Result")


@dataclass(frozen=True)
class Retries:
    """How often to try in all, and the longest pause after the first try; each pause may be twice as long as the one before."""

    attempts: int
    first_pause_s: float


class Transient(Exception):
    """A try failed in a way that the next one may not."""


def longest_pause_s(retries: Retries, tries: int) -> float:
    """Limit of the pause after so many tries, from 1 on."""
    return min(retries.first_pause_s * 2 ** (tries - 1), MAX_PAUSE_S)


def with_retries(action: Callable[[], Result], retries: Retries, sleep: Callable[[float], None] = time.sleep) -> Result:
    """The result of `action`, which raises Transient where it is worth another try. Raises the last Transient, and all else at once."""
    for tries in range(1, retries.attempts):
        try:
            return action()
        except Transient:
            # Any pause up to the limit: processes that failed together do not come back together.
            sleep(random.uniform(0.0, longest_pause_s(retries, tries)))
    return action()
