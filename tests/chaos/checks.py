"""What must hold after every life, and of a run that is complete, however it came there."""

from dataclasses import dataclass
from pathlib import Path

from megatron_keye.checkpoint.store import checkpoints, find_damage
from megatron_keye.errors import LedgerError
from megatron_keye.plan.ledger_proof import first_difference, prove
from megatron_keye.train.ledger import run_files
from megatron_keye.train.run_dir import RunDir
from tests.chaos.life import ChaosError, LifeEnd
from tests.chaos.scene import BATCH_SAMPLES, REFERENCE_LAYOUT, STEPS, Scene, read_contents, step_lines
from tests.chaos.schedule import HARMLESS, Life
from tests.tiny import losses

LOSS_TOLERANCE = 1e-9
"""Relative, in float64: what another order of additions makes of some steps."""
FULL_DISK = ("cannot write", "could not be saved", "cannot be written")
"""One of these must be in the error of a run that met a full disk."""


@dataclass(frozen=True)
class Progress:
    """Steps in the newest checkpoint, and whether the run is complete."""

    steps: int
    is_complete: bool


def check_life(run: Path, life: Life, end: LifeEnd, before_steps: int) -> Progress:
    """Raises ChaosError where the life ended otherwise than it had to, damaged a checkpoint, lost one, or decoded in vain."""
    fatal = [strike for strike in end.strikes if strike.disturbance.kind not in HARMLESS]
    if end.error is not None and not fatal:
        raise ChaosError(f"the run failed without a reason, after {end.strikes}:\n{end.error}")
    if end.error is not None and end.was_struck_by("fill_disk") and not any(words in end.error for words in FULL_DISK):
        raise ChaosError(f"the error of a run on a full disk does not say so:\n{end.error}")
    saved = checkpoints(RunDir(run).checkpoints)
    damage = [problem for path in saved for problem in find_damage(path)]
    if damage:
        raise ChaosError(f"after {end.strikes} a checkpoint is damaged: {damage}")
    steps = max((int(path.name.split("_")[1]) for path in saved), default=0)
    if steps < before_steps:
        raise ChaosError(f"after {end.strikes} the newest checkpoint has {steps} steps, and one of {before_steps} was there before")
    most = (end.steps + 1 + max(1, life.prefetch_steps)) * BATCH_SAMPLES
    if end.samples_read > most:
        raise ChaosError(f"{end.samples_read} samples were decoded for {end.steps} steps, expected at most {most}: some were skipped")
    return Progress(steps, RunDir(run).is_done)


def check_run(run: Path, scene: Scene, layouts: set[str]) -> float:
    """Of a complete run: the same samples in the same steps as in the undisturbed run, the same loss curve, and a proved ledger.

    Returns the largest relative difference of a loss: 0 where the layout was the same all along. Raises ChaosError.
    """
    difference = first_difference(step_lines(run), step_lines(scene.reference))
    if difference is not None:
        raise ChaosError(
            f"step {difference.step}, slot {difference.slot}: the {difference.name} is {difference.first}, that of the undisturbed run "
            f"{difference.second}"
        )
    try:
        proof = prove([run_files(run)])
    except LedgerError as error:
        raise ChaosError(f"the ledger proves nothing: {error}") from error
    if proof.steps != STEPS or proof.segments != 1:
        raise ChaosError(f"the ledger proves {proof.steps} steps in {proof.segments} segments, expected {STEPS} in one")
    _check_contents(run, scene)
    return _loss_difference(losses(run), scene.losses, 0.0 if layouts == {REFERENCE_LAYOUT} else LOSS_TOLERANCE)


def _check_contents(run: Path, scene: Scene) -> None:
    found = read_contents(run)
    for line in step_lines(run):
        for name, sample in zip(line.ids, line.samples, strict=True):
            expected = scene.contents[line.step][sample]
            if found.get(line.step, {}).get(sample) != expected:
                raise ChaosError(f"step {line.step}: the place of sample {name} held other tokens or pixels than in the undisturbed run")


def _loss_difference(found: dict[int, float], expected: dict[int, float], tolerance: float) -> float:
    if found.keys() != expected.keys():
        raise ChaosError(f"metrics have the steps {sorted(found)}, expected {sorted(expected)}")
    differences = {step: abs(found[step] - loss) / abs(loss) for step, loss in expected.items()}
    for step, difference in differences.items():
        if difference > tolerance:
            raise ChaosError(
                f"step {step}: the loss is {found[step]!r}, that of the undisturbed run {expected[step]!r}, which is {difference:.1e} "
                f"of it away; expected at most {tolerance:g}"
            )
    return max(differences.values())
