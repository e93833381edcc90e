"""The resume state: a few numbers from which every later step plan follows, and whose numbers they are."""

import json
import re
from dataclasses import astuple, dataclass

from megatron_keye.errors import CheckpointError, PlanError
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.digest import LEDGER_START
from megatron_keye.plan.lookahead import Lookahead
from megatron_keye.plan.windows import Progress, Stretch

PLAN_VERSION = 1
"""Raised whenever the same cursor would give other members. Placement may change without it."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a run stands after its last committed step. The start of a run is `Cursor()`."""

    step: int = 0
    """The step to plan next."""
    position: int = 0
    """Samples taken from the order so far, over all epochs."""
    ledger: bytes = LEDGER_START
    """Hash chain over the samples of every step so far, 32 bytes."""
    stretches: tuple[Stretch, ...] = ()
    """How the last of them were taken where steps are planned several batches at a time; see `windows.py`."""

    @property
    def progress(self) -> Progress:
        return Progress(self.position, self.stretches)


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What must not change for a cursor to keep its meaning."""

    seed: int
    dataset_fingerprint: str
    global_batch_samples: int
    plan_version: int = PLAN_VERSION


@dataclass(frozen=True, slots=True)
class ResumeState:
    """What a checkpoint stores: a cursor and the run it belongs to. The same on every rank, at every layout."""

    cursor: Cursor
    run: RunIdentity

    def to_json(self) -> str:
        """One line of JSON: some 250 bytes, and 100 for each stretch."""
        fields = {
            "step": self.cursor.step,
            "position": self.cursor.position,
            "ledger": self.cursor.ledger.hex(),
            "seed": self.run.seed,
            "dataset_fingerprint": self.run.dataset_fingerprint,
            "global_batch_samples": self.run.global_batch_samples,
            "plan_version": self.run.plan_version,
        }
        if self.cursor.stretches:
            fields["stretches"] = [_stretch_numbers(stretch) for stretch in self.cursor.stretches]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> "ResumeState":
        """The inverse of `to_json`. Raises CheckpointError for anything else."""
        fields = _parse_fields(text)
        stretches = tuple(_stretch(numbers) for numbers in fields.get("stretches", []))
        cursor = Cursor(fields["step"], fields["position"], bytes.fromhex(fields["ledger"]), stretches)
        if cursor.progress.base < 0:
            raise CheckpointError(f"The resume state's stretches hold more than its {cursor.position} samples. {_REMEDY}")
        run = RunIdentity(fields["seed"], fields["dataset_fingerprint"], fields["global_batch_samples"], fields["plan_version"])
        return cls(cursor, run)


_FIELD_TYPES = {
    "step": int,
    "position": int,
    "ledger": str,
    "seed": int,
    "dataset_fingerprint": str,
    "global_batch_samples": int,
    "plan_version": int,
    "stretches": list,
}
_OPTIONAL = {"stretches"}


_REMEDY = "The checkpoint is damaged or was not written by this program; use an earlier one."


def _stretch_numbers(stretch: Stretch) -> list:
    ahead = stretch.lookahead
    cost = None if ahead.cost is None else list(astuple(ahead.cost))
    return [stretch.steps, stretch.global_batch_samples, ahead.batches, ahead.canonical_replicas, ahead.growth_percent, cost]


def _stretch(numbers: list) -> Stretch:
    """The inverse of `_stretch_numbers`. Raises CheckpointError for anything else."""
    try:
        steps, global_batch_samples, batches, canonical_replicas, growth_percent, cost = numbers
        cost = None if cost is None else CostModel(*cost)
        whole = [steps, global_batch_samples, batches, canonical_replicas, growth_percent, *(astuple(cost) if cost else ())]
        if not all(type(number) is int and number >= 0 for number in whole) or min(steps, global_batch_samples) < 1:
            raise ValueError("expected whole numbers, and at least one step and one sample")
        return Stretch(steps, global_batch_samples, Lookahead(batches, canonical_replicas, growth_percent, cost))
    except (TypeError, ValueError, PlanError) as error:
        raise CheckpointError(f"The resume state's stretches hold {numbers!r} ({error}). {_REMEDY}") from error


def _parse_fields(text: str) -> dict:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"The resume state is not JSON ({error}). {_REMEDY}") from error
    if not isinstance(fields, dict) or not _FIELD_TYPES.keys() - _OPTIONAL <= fields.keys() <= _FIELD_TYPES.keys():
        found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise CheckpointError(f"The resume state holds {found} where {sorted(_FIELD_TYPES)} was expected. {_REMEDY}")
    for name, kind in _FIELD_TYPES.items():
        if name in fields and type(fields[name]) is not kind:
            raise CheckpointError(
                f"The resume state's {name} is {fields[name]!r} where a value of type {kind.__name__} was expected. {_REMEDY}"
            )
    for name in ("step", "position"):
        if fields[name] < 0:
            raise CheckpointError(f"The resume state's {name} is {fields[name]} where 0 or more was expected. {_REMEDY}")
    if not re.fullmatch("[0-9a-f]{64}", fields["ledger"]):
        raise CheckpointError(f"The resume state's ledger is {fields['ledger']!r} where 64 hexadecimal digits were expected. {_REMEDY}")
    return fields


def check_resumable(saved: ResumeState, run: RunIdentity) -> None:
    """Raise CheckpointError, naming each difference and its remedy, unless `run` would go on exactly where `saved` stopped."""
    new_run = "start a new run from these weights"
    remedies = {
        "seed": f"set train.seed back to {saved.run.seed}, or {new_run}",
        "dataset_fingerprint": f"point data.train to the dataset the run began with, unchanged, or {new_run}",
        "global_batch_samples": f"set data.global_batch_samples back to {saved.run.global_batch_samples}, or {new_run}",
        "plan_version": f"use the version of megatron_keye that wrote the checkpoint, or {new_run}",
    }
    problems = []
    for name, remedy in remedies.items():
        before, now = getattr(saved.run, name), getattr(run, name)
        if before != now:
            problems.append(f"{name} is {now!r}, but the checkpoint's is {before!r}: {remedy}")
    if problems:
        raise CheckpointError(
            f"Cannot resume at step {saved.cursor.step}: the sequence of samples would not go on as it was.\n"
            + "\n".join(f"  - {p}" for p in problems)
        )
