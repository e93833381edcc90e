"""What a campaign does to a run: a list of lives, which follows from a seed alone.

A life is one start of the run, under a layout of its own, and what befalls it until it ends. The next life goes on from the newest
checkpoint.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal[
    "setup", "restore", "load", "encode", "decoder", "encode_backward", "optimizer", "record", "save", "rename"
]  # fmt: skip
"""What a rank is at: a start has the first two, a step those from `load` to `record`. `rename` is the commit of a checkpoint: from the
writing of its manifest to the removal of older ones."""
PHASES: tuple[Phase, ...] = get_args(Phase)
AIMED: dict[Phase, int] = {"restore": 1, "load": 1, "encode": 1, "decoder": 1, "optimizer": 1, "save": 2, "rename": 3}
"""Phases in which moments are put on purpose, and how often each is drawn."""

Kind = Literal["kill_rank", "kill_leader", "kill_all", "kill_worker", "pause_rank", "pause_worker", "fill_disk"]
HARMLESS: tuple[Kind, ...] = ("kill_worker", "pause_rank", "pause_worker")
"""A run survives these."""
FATAL = {"kill_rank": 4, "kill_leader": 3, "kill_all": 2, "fill_disk": 1}
"""Ways for a life to end, and how often each is drawn."""

LAYOUTS = ("one", "dp2", "tp2", "pp2", "cp2", "tp2dp2")
ROOM_BYTES = (0, 64 << 10)
"""What a full disk still takes of one file: nothing, or all small files but no checkpoint."""


@dataclass(frozen=True)
class Moment:
    """`fraction` of the wall time that the life is expected to take; or of `phase`, the first time that the victim is in it after
    `after_steps` steps of the life."""

    fraction: float
    phase: Phase | None = None
    after_steps: int = 0


@dataclass(frozen=True)
class Disturbance:
    """One act of violence. `choice`, a fraction, picks among the possible victims."""

    kind: Kind
    moment: Moment
    choice: float = 0.0
    pause_s: float = 0.0
    room_bytes: int = 0


@dataclass(frozen=True)
class Life:
    """`disturbances` come in order, each once the one before is done; only the last may be fatal. `span_steps` is how many steps the
    expected wall time has. With `async_save`, checkpoints are written in the background."""

    layout: str
    prefetch_steps: int = 2
    workers: int = 0
    span_steps: int = 4
    disturbances: tuple[Disturbance, ...] = ()
    async_save: bool = False

    @property
    def fills_disk(self) -> bool:
        """What stands for a full disk bounds memory files too, so that such a life can have neither workers nor shared memory."""
        return any(disturbance.kind == "fill_disk" for disturbance in self.disturbances)


def schedule(seed: int, num_lives: int, layouts: Sequence[str] = LAYOUTS) -> tuple[Life, ...]:
    """`num_lives` lives with a fatal end each. A longer schedule of a seed begins with the shorter ones."""
    return tuple(_draw_life(random.Random(f"{seed}/{number}"), layouts) for number in range(num_lives))


def _draw_life(rng: random.Random, layouts: Sequence[str]) -> Life:
    end: Kind = rng.choices(list(FATAL), weights=list(FATAL.values()))[0]
    # Worker processes start from nothing, which takes longer than all the rest of a life.
    workers = rng.choice((1, 2)) if rng.random() < 0.2 and end != "fill_disk" else 0
    disturbances = (_draw(rng, end),)
    if workers or rng.random() < 0.3:
        kind: Kind = rng.choice(HARMLESS) if workers else "pause_rank"
        disturbances = (_draw(rng, kind), *disturbances)
    return Life(rng.choice(list(layouts)), rng.randint(0, 3), workers, rng.randint(2, 6), disturbances, rng.random() < 0.5)


def _draw(rng: random.Random, kind: Kind) -> Disturbance:
    """Half of the moments are uniform over the life, the others within a phase, or short ones would hardly ever be met."""
    phase = rng.choice((None, *rng.choices(list(AIMED), weights=list(AIMED.values()))))
    moment = Moment(rng.random(), phase, rng.randint(0, 2) if phase else 0)
    pause_s = rng.uniform(0.1, 1.0) if kind.startswith("pause") else 0.0
    return Disturbance(kind, moment, rng.random(), pause_s, rng.choice(ROOM_BYTES) if kind == "fill_disk" else 0)
