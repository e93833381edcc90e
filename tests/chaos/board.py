"""Memory that ranks and the harness share: which process is which rank, and what it is at. It outlives a rank that is killed."""

import mmap
import time

import numpy as np

from tests.chaos.schedule import PHASES, Phase

_RANK = np.dtype([
    ("pid", np.int64), ("is_leader", np.int64), ("first_step", np.int64), ("step", np.int64), ("phase", np.int64),
    ("held_in", np.int64), ("held_after", np.int64), ("samples_read", np.int64),
    ("is_writing", np.int64),
    ("entered_s", np.float64), ("spent_s", np.float64, len(PHASES)), ("last_s", np.float64, len(PHASES)),
])  # fmt: skip
MAX_RANKS = 8
HELD_POLL_S = 0.0005


class Place:
    """One rank's part of the board, written by that rank alone but for `hold` and `release`."""

    def __init__(self, row: np.ndarray):
        self._row = row

    def arrive(self, pid: int, is_leader: bool) -> None:
        self._row["is_leader"], self._row["entered_s"] = is_leader, time.monotonic()
        self._row["pid"] = pid

    def enter(self, phase: Phase) -> None:
        """The phase before it ends here. Returns when nobody holds the rank in this one."""
        now_s, before, number = time.monotonic(), self._row["phase"], PHASES.index(phase)
        self._row["last_s"][before] = now_s - self._row["entered_s"]
        self._row["spent_s"][before] += self._row["last_s"][before]
        self._row["entered_s"], self._row["phase"] = now_s, number
        while self._row["held_in"] == number + 1 and self._row["step"] - self._row["first_step"] >= self._row["held_after"]:
            time.sleep(HELD_POLL_S)

    def begin(self, step: int) -> None:
        """The first step of this life."""
        self._row["first_step"] = self._row["step"] = step

    def finished(self, num_steps: int) -> None:
        self._row["step"] = num_steps

    def has_read(self, num_samples: int) -> None:
        """So many samples since the life began."""
        self._row["samples_read"] = num_samples

    def is_writing(self, value: bool) -> None:
        """Whether a checkpoint of this rank is on its way in the background."""
        self._row["is_writing"] = value

    @property
    def phase(self) -> Phase:
        return PHASES[self._row["phase"]]


class Board:
    """Must be made before the ranks are forked."""

    def __init__(self) -> None:
        self._ranks = np.frombuffer(mmap.mmap(-1, _RANK.itemsize * MAX_RANKS), dtype=_RANK)

    def clear(self) -> None:
        self._ranks[:] = np.zeros(1, _RANK)

    def place(self, rank: int) -> Place:
        return Place(self._ranks[rank])

    def pids(self) -> dict[int, int]:
        """By rank, of those that have arrived."""
        return {rank: int(pid) for rank, pid in enumerate(self._ranks["pid"]) if pid}

    def leaders(self) -> list[int]:
        """Ranks that read and decode for their replica."""
        return np.flatnonzero(self._ranks["is_leader"]).tolist()

    def phase(self, rank: int) -> Phase:
        """What the rank is at. Those that save wait while the main rank renames, which then is what all are at."""
        own, main = (PHASES[self._ranks["phase"][number]] for number in (rank, 0))
        return main if (own, main) == ("save", "rename") else own

    def hold(self, rank: int, phase: Phase, after_steps: int) -> None:
        """Have the rank wait where it enters the phase after so many steps of this life, or it might be over before anybody looks."""
        self._ranks["held_after"][rank], self._ranks["held_in"][rank] = after_steps, PHASES.index(phase) + 1

    def release(self, rank: int) -> None:
        self._ranks["held_in"][rank] = 0

    def steps_here(self, rank: int) -> int:
        """Steps that the rank has finished in this life."""
        return int(self._ranks["step"][rank] - self._ranks["first_step"][rank])

    def is_writing(self, rank: int) -> bool:
        """Whether the rank has begun to write a checkpoint in the background that is not committed yet."""
        return bool(self._ranks["is_writing"][rank])

    def samples_read(self) -> int:
        """By all leaders together."""
        return int(self._ranks["samples_read"].sum())

    def spent_s(self) -> dict[Phase, float]:
        """Seconds that the main rank was in each phase, all in all."""
        return dict(zip(PHASES, self._ranks["spent_s"][0].tolist(), strict=True))

    def last_s(self) -> dict[Phase, float]:
        """Seconds that the main rank was in each phase the last time, when all was warm."""
        return dict(zip(PHASES, self._ranks["last_s"][0].tolist(), strict=True))
