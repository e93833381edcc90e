"""One life of a run: ranks forked from this process, which has everything imported, and what is done to them from outside."""

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_keye.config.schema import RunConfig
from megatron_keye.errors import KeyeError
from megatron_keye.parallel.launch import WorkerError
from megatron_keye.train.layouts import parse_layout
from tests.chaos.board import Board
from tests.chaos.rank import WatchedTraining, train_watched
from tests.chaos.schedule import Disturbance, Life, Moment, Phase
from tests.tiny import on_ranks

LIFE_LIMIT_S = 240.0
"""For a machine on which much else runs. Nothing in a life takes long."""
GONE_LIMIT_S = 60.0
"""A worker that was killed with its leader while it started is gone in a second, on a machine that is idle."""
POLL_S = 0.001


class ChaosError(Exception):
    """What a campaign found wrong, in words."""


@dataclass(frozen=True)
class Pace:
    """How long things take in an undisturbed run: until the first step, a step with its share of saves, each phase once."""

    start_s: float
    step_s: float
    phase_s: dict[Phase, float]

    def seconds(self, moment: Moment, span_steps: int) -> float:
        """From the start of what the moment counts from."""
        whole_s = self.start_s + span_steps * self.step_s if moment.phase is None else self.phase_s[moment.phase]
        return moment.fraction * whole_s


@dataclass(frozen=True)
class Strike:
    """A disturbance that took place, what its victim was at, and whether it was also writing a checkpoint in the background."""

    disturbance: Disturbance
    phase: Phase
    was_writing: bool


@dataclass(frozen=True)
class LifeEnd:
    """How a life went. `error` is what ended it, None for a run that is complete."""

    strikes: tuple[Strike, ...]
    error: str | None
    steps: int
    samples_read: int

    def was_struck_by(self, kind: str) -> bool:
        return any(strike.disturbance.kind == kind for strike in self.strikes)


@dataclass(frozen=True)
class Process:
    pid: int
    state: str
    parent: int
    group: int


def processes() -> Iterator[Process]:
    """All of this machine that still run, or are stopped."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, group = path.read_text().rpartition(")")[2].split()[:3]
            if state not in "ZX":
                yield Process(int(path.parent.name), state, int(parent), int(group))


def live(life: Life, config: RunConfig, path: Path, kind: type[WatchedTraining], pace: Pace, board: Board) -> LifeEnd:
    """Start the run in `path` and do to it what the life says. What it prints goes to `path`.log.

    Raises ChaosError where it hangs or leaves a process behind.
    """
    board.clear()
    receiving, sending = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    launcher = context.Process(target=_launch, args=(sending, life.layout, config, path, board, kind))
    launcher.start()
    sending.close()
    # By both, so that the group is there whoever comes first.
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(launcher.pid, launcher.pid)
    try:
        strikes = _Violence(life, pace, board, launcher).act()
        if not receiving.poll(LIFE_LIMIT_S):
            raise ChaosError(f"the run in {path} hung for {LIFE_LIMIT_S:g} s after {strikes}")
        error = receiving.recv()
        launcher.join(GONE_LIMIT_S)
    finally:
        _end(launcher)
    return LifeEnd(strikes, error, board.steps_here(0), board.samples_read())


def _launch(sending, layout: str, config: RunConfig, path: Path, board: Board, kind: type[WatchedTraining]) -> None:
    os.setpgid(0, 0)
    with path.with_suffix(".log").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        on_ranks(layout, config, train_watched, path, board, kind, timeout_s=LIFE_LIMIT_S)
        sending.send(None)
    except (WorkerError, KeyeError) as error:
        sending.send(str(error))
    os._exit(0)


def _end(launcher) -> None:
    """Leaves no process of the group. Raises ChaosError where one outlives the launcher."""
    if launcher.is_alive():
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.join()
        return
    deadline = time.monotonic() + GONE_LIMIT_S
    while (left := [process for process in processes() if process.group == launcher.pid]) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        os.killpg(launcher.pid, signal.SIGKILL)
        raise ChaosError(f"processes of a life were left behind: {left}")


class _Violence:
    """Carries out the disturbances of one life."""

    def __init__(self, life: Life, pace: Pace, board: Board, launcher):
        self._life, self._pace, self._board, self._launcher = life, pace, board, launcher

    def act(self) -> tuple[Strike, ...]:
        """What could be done before the run ended."""
        num_ranks = parse_layout(self._life.layout).world_size
        if not self._wait(lambda: len(self._board.pids()) == num_ranks):
            return ()
        began_s, strikes = time.monotonic(), []
        for disturbance in self._life.disturbances:
            rank = self._victim(disturbance)
            if self._await(disturbance.moment, rank, began_s) and self._do(disturbance, rank):
                strikes.append(Strike(disturbance, self._board.phase(rank), self._board.is_writing(rank)))
        return tuple(strikes)

    def _victim(self, disturbance: Disturbance) -> int:
        """The rank, or the leader that has the worker."""
        ranks = list(self._board.pids())
        if disturbance.kind in ("kill_leader", "kill_worker", "pause_worker"):
            ranks = self._board.leaders()
        return ranks[int(disturbance.choice * len(ranks))]

    def _await(self, moment: Moment, rank: int, began_s: float) -> bool:
        """False where the run ends before."""
        if moment.phase is not None:
            if not self._reaches(moment.phase, moment.after_steps, rank):
                return False
            began_s = time.monotonic()
        deadline = began_s + self._pace.seconds(moment, self._life.span_steps)
        return self._wait(lambda: time.monotonic() >= deadline)

    def _reaches(self, phase: Phase, after_steps: int, rank: int) -> bool:
        """Wait until the rank is in the phase; False where the run ends before."""
        held = 0 if phase == "rename" else rank
        self._board.hold(held, phase, after_steps)
        is_there = self._wait(lambda: self._board.phase(rank) == phase and self._board.steps_here(rank) >= after_steps)
        self._board.release(held)
        return is_there

    def _do(self, disturbance: Disturbance, rank: int) -> bool:
        """False where there is nobody to do it to."""
        pids = self._board.pids()
        match disturbance.kind:
            case "kill_rank" | "kill_leader":
                victims = [pids[rank]]
            case "kill_all" | "fill_disk":
                victims = list(pids.values())
            case "pause_rank":
                victims = [pids[rank]]
            case "kill_worker" | "pause_worker":
                victims = [process.pid for process in processes() if process.parent == pids[rank]][:1]
        with suppress(ProcessLookupError):
            for pid in victims:
                _strike(pid, disturbance)
        return bool(victims)

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Until it holds; False where the run ends before."""
        deadline = time.monotonic() + LIFE_LIMIT_S
        while not condition():
            if not self._launcher.is_alive() or time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True


def _strike(pid: int, disturbance: Disturbance) -> None:
    match disturbance.kind:
        case "fill_disk":
            # Nobody may fill a disk that others use. With this limit a write fails in the middle of a file, as on a full disk; only
            # the error's name differs: EFBIG in place of ENOSPC.
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (disturbance.room_bytes, hard))
        case "pause_rank" | "pause_worker":
            os.kill(pid, signal.SIGSTOP)
            time.sleep(disturbance.pause_s)
            os.kill(pid, signal.SIGCONT)
        case _:
            os.kill(pid, signal.SIGKILL)
