"""The stage of a campaign: a small data set, settings, and the undisturbed run that everything is compared with."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_keye.config.schema import RunConfig
from megatron_keye.plan.ledger import StepLine
from megatron_keye.train.ledger import read_ledger
from megatron_keye.train.run_dir import RunDir
from tests.chaos.board import Board
from tests.chaos.life import ChaosError, Pace, live
from tests.chaos.rank import WITNESS, WatchedTraining
from tests.chaos.schedule import Life
from tests.tiny import TinySet, image_part, losses, make_tiny_set, tiny_record, write_part

REFERENCE_LAYOUT = "dp2"
STEPS = 14
BATCH_SAMPLES = 4
WINDOW_STEPS = 3
SAVE_EVERY_STEPS = 2
SETTINGS = (
    "train.precision=fp64", f"train.steps={STEPS}", f"train.save_every_steps={SAVE_EVERY_STEPS}", "data.valid=null",
    f"data.global_batch_samples={BATCH_SAMPLES}", f"data.lookahead.batches={WINDOW_STEPS}", "encode.patches_per_round=80",
)  # fmt: skip
MIXTURE = """\
sources:
  - {name: pictures, path: pictures}
  - {name: texts, path: texts, repeats: 2}
"""
ALONE = 48
"""Samples of the one set without a mixture: its first epoch ends with a window, a batch and a save."""
NO_PACE = Pace(0.0, 0.0, {})


@dataclass(frozen=True)
class Scene:
    """`config` has no layout yet. `epoch_starts` are the steps before which an epoch of some source has ended."""

    config: RunConfig
    reference: Path
    pace: Pace
    epoch_starts: frozenset[int]
    losses: dict[int, float]
    contents: dict[int, dict[int, int]]


def set_scene(folder: Path, board: Board, mixed: bool = True) -> Scene:
    """Writes data in `folder` and runs the undisturbed run there."""
    tiny = make_tiny_set(folder)
    train = _write_mixture(folder) if mixed else write_part(folder, "alone", [tiny_record(number) for number in range(ALONE)])
    config, reference = _config(tiny, train), folder / "reference"
    end = live(Life(REFERENCE_LAYOUT), config, reference, WatchedTraining, NO_PACE, board)
    if end.error is not None:
        raise ChaosError(f"the undisturbed run failed: {end.error}")
    spent_s = board.spent_s()
    start_s = spent_s["setup"] + spent_s["restore"]
    pace = Pace(start_s, (sum(spent_s.values()) - start_s) / STEPS, board.last_s())
    return Scene(config, reference, pace, frozenset(_epoch_starts(reference)), losses(reference), read_contents(reference))


def read_contents(run: Path) -> dict[int, dict[int, int]]:
    """By step, what stood in the place of each sample. Raises ChaosError where it was not the same each time the step was loaded."""
    found: dict[int, dict[int, int]] = {}
    for line in (run / WITNESS).read_text(encoding="utf-8").splitlines():
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            continue  # an empty line, or one that was cut off
        step, held = fields["step"], found.setdefault(fields["step"], {})
        for sample, crc32 in fields["crc32"].items():
            before = held.setdefault(int(sample), crc32)
            if before != crc32:
                raise ChaosError(f"step {step}: the place of sample {sample} held other tokens or pixels when it was loaded again")
    return found


def step_lines(run: Path) -> list[StepLine]:
    """The step lines of a run's ledger."""
    return [line for line in read_ledger(RunDir(run).ledger) if isinstance(line, StepLine)]


def _config(tiny: TinySet, train: Path) -> RunConfig:
    return tiny.config(*SETTINGS, f"data.train={train}")


def _write_mixture(folder: Path) -> Path:
    """Pictures of two sizes and texts of one length, so that samples could be taken for each other without an error."""
    pictures = [_record(f"p{number:02}", [image_part(number % 2)]) for number in range(12)]
    write_part(folder, "pictures", pictures)
    write_part(folder, "texts", [_record(f"t{number:02}", []) for number in range(6)])
    path = folder / "mixture.yaml"
    path.write_text(MIXTURE)
    return path


def _record(name: str, media: list[dict]) -> dict:
    """The number is in the question and in the answer, digit by digit, so that all have as many tokens."""
    digits = " ".join(name)
    text = {"type": "text", "text": f"which one is {digits}?"}
    return {"id": name, "messages": [{"role": "user", "content": [*media, text]}, {"role": "assistant", "content": digits}]}


def _epoch_starts(run: Path) -> Iterator[int]:
    """Steps whose samples begin an epoch of a source which no step before has touched."""
    seen: set[int] = {0}
    for line in step_lines(run):
        epochs = set(line.slot_epochs)
        if epochs - seen:
            yield line.step
        seen |= epochs
