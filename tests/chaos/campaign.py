"""A campaign: one life after another, each going on where the one before was killed; a new run where one is complete.

Every run ends with an undisturbed life, and is then compared with the undisturbed run.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from megatron_keye.config.schema import RunConfig
from tests.chaos.board import Board
from tests.chaos.checks import check_life, check_run
from tests.chaos.life import ChaosError, LifeEnd, Strike, live
from tests.chaos.rank import WatchedTraining
from tests.chaos.scene import WINDOW_STEPS, Scene
from tests.chaos.schedule import Life


@dataclass
class Report:
    """What was done and found. `restarts` are the steps from which runs went on, run by run."""

    strikes: list[Strike] = field(default_factory=list)
    restarts: list[list[int]] = field(default_factory=list)
    worst_loss_difference: float = 0.0

    @property
    def kills(self) -> list[Strike]:
        return [strike for strike in self.strikes if strike.disturbance.kind.startswith("kill")]

    @property
    def kills_while_writing(self) -> int:
        """Kills of a rank that had a checkpoint on its way in the background."""
        return sum(strike.was_writing for strike in self.kills)

    def per_phase(self) -> Counter[tuple[str, str]]:
        """Strikes by (phase, kind)."""
        return Counter((strike.phase, strike.disturbance.kind) for strike in self.strikes)

    @property
    def num_restarts(self) -> int:
        return sum(map(len, self.restarts))

    @property
    def most_in_a_row(self) -> int:
        """Restarts of one run from the same step."""
        return max((len(list(same)) for steps in self.restarts for _, same in groupby(steps)), default=0)

    def restarts_at(self, scene: Scene) -> dict[str, int]:
        """Restarts at moments that are easily got wrong."""
        steps = [step for run in self.restarts for step in run]
        return {
            "at step 0": steps.count(0),
            "at an epoch end": sum(step in scene.epoch_starts for step in steps),
            "at a window edge": sum(step > 0 and step % WINDOW_STEPS == 0 for step in steps),
            "inside a window": sum(step % WINDOW_STEPS > 0 for step in steps),
        }


OnLife = Callable[[int, Report], None]
"""Called after every life with its number and the report so far."""


def run_campaign(
    scene: Scene, lives: Sequence[Life], folder: Path, board: Board, on_life: OnLife, kind: type[WatchedTraining] = WatchedTraining
) -> Report:
    """Run all `lives` in new run directories in `folder`. Raises ChaosError, which names the life and what is wrong."""
    report, number = Report(), 0
    while number < len(lives):
        run = _Run(scene, folder / f"run{len(report.restarts):03}", board, kind)
        report.restarts.append(run.restarts)
        while number < len(lives) and not run.is_complete:
            end = run.live(lives[number], f"life {number}")
            report.strikes += end.strikes
            number += 1
            on_life(number, report)
        report.worst_loss_difference = max(report.worst_loss_difference, run.complete())
    return report


class _Run:
    """One run directory, through its lives."""

    def __init__(self, scene: Scene, path: Path, board: Board, kind: type[WatchedTraining]):
        self._scene, self._path, self._board, self._kind = scene, path, board, kind
        self._steps, self._layouts, self._num_lives = 0, set(), 0
        self.is_complete = False
        self.restarts: list[int] = []
        """The steps from which it went on."""

    def live(self, life: Life, name: str) -> LifeEnd:
        if self._num_lives:
            self.restarts.append(self._steps)
        self._num_lives += 1
        self._layouts.add(life.layout)
        try:
            end = live(life, _settings(self._scene.config, life), self._path, self._kind, self._scene.pace, self._board)
            progress = check_life(self._path, life, end, self._steps)
        except ChaosError as error:
            raise ChaosError(f"{name} of {self._path.name}, {life}: {error}") from error
        self._steps, self.is_complete = progress.steps, progress.is_complete
        return end

    def complete(self) -> float:
        """Undisturbed to the end, and what the comparison gives. Raises ChaosError where something is wrong."""
        if not self.is_complete:
            end = self.live(Life(sorted(self._layouts)[0]), "the last life")
            if not self.is_complete:
                raise ChaosError(f"{self._path.name} did not end by itself: {end}")
        try:
            return check_run(self._path, self._scene, self._layouts)
        except ChaosError as error:
            raise ChaosError(f"{self._path.name}, after {self._num_lives} lives under {sorted(self._layouts)}: {error}") from error


def _settings(config: RunConfig, life: Life) -> RunConfig:
    """The life's own settings in place of the scene's."""
    loader = config.data.loader.model_copy(update={"workers": life.workers})
    transport = "collective" if life.fills_disk else config.data.transport
    data = config.data.model_copy(update={"prefetch_steps": life.prefetch_steps, "loader": loader, "transport": transport})
    train = config.train.model_copy(update={"async_save": life.async_save})
    return config.model_copy(update={"data": data, "train": train})
