"""The resume state: a few numbers from which every later step plan follows, and the order whose positions they count."""

import json
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from megatron_keye.errors import CheckpointError, PlanError
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.digest import LEDGER_START
from megatron_keye.plan.lookahead import Lookahead
from megatron_keye.plan.mixture import Mixture, Source, Stage, Standing, continued
from megatron_keye.plan.remap import NO_REMAP, Remap
from megatron_keye.plan.windows import Progress, Stretch

PLAN_VERSION = 2
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
class ResumeState:
    """What a checkpoint stores: a cursor, and the order whose positions it counts. The same on every rank, at every layout."""

    cursor: Cursor
    mixture: Mixture
    plan_version: int = PLAN_VERSION

    def to_json(self) -> str:
        """One line of JSON: some 350 bytes, and 100 for each further source, stage and stretch."""
        fields = {
            "step": self.cursor.step,
            "position": self.cursor.position,
            "ledger": self.cursor.ledger.hex(),
            "seed": self.mixture.seed,
            "blocks_per_window": self.mixture.blocks_per_window,
            "sources": [_source_numbers(source) for source in self.mixture.sources],
            "stages": [list(astuple(stage)) for stage in self.mixture.stages],
            "plan_version": self.plan_version,
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
        mixture = _mixture(fields)
        if mixture.stages[0].position > cursor.progress.base:
            raise CheckpointError(f"The resume state's stages begin at position {mixture.stages[0].position}, after its samples. {_REMEDY}")
        return cls(cursor, mixture, fields["plan_version"])

    def going_on(self, wanted: Mixture) -> "ResumeState":
        """The state from which a run with the mixture `wanted` now goes on: every sample of an epoch is used once all the same.

        Raises CheckpointError, naming each difference and its remedy, where the sequence of samples would not go on as it was.
        """
        problems = []
        if self.plan_version != PLAN_VERSION:
            problems.append(
                f"plan_version is {PLAN_VERSION}, but the checkpoint's is {self.plan_version}: use the version of megatron_keye that "
                "wrote it"
            )
        progress = self.cursor.progress
        try:
            mixture = continued(self.mixture, wanted, progress.frontier)
        except PlanError as error:
            problems += str(error).splitlines()
        if problems:
            raise CheckpointError(
                f"Cannot resume at step {self.cursor.step}: the sequence of samples would not go on as it was.\n"
                + "\n".join(f"  - {problem}" for problem in problems)
                + "\nOr start a new run from these weights."
            )
        return replace(self, mixture=mixture.since(progress.base))

    def remapped(self, sources: Sequence[Source], standings: Sequence[Standing]) -> "ResumeState":
        """The state from which a run with these `sources`, whose data changed, goes on; see `Mixture.remapped`."""
        cursor = replace(self.cursor, stretches=())
        return replace(self, cursor=cursor, mixture=self.mixture.remapped(sources, cursor.position, standings))


_FIELD_TYPES = {
    "step": int,
    "position": int,
    "ledger": str,
    "seed": int,
    "blocks_per_window": int,
    "sources": list,
    "stages": list,
    "plan_version": int,
    "stretches": list,
}
_OPTIONAL = {"stretches"}


_REMEDY = "The checkpoint is damaged or was not written by this program; use an earlier one."


def _source_numbers(source: Source) -> list:
    *numbers, remap = astuple(source)
    return numbers if source.remap == NO_REMAP else [*numbers, remap]


def _source(numbers: list) -> Source:
    """The inverse of `_source_numbers`. Raises TypeError or ValueError for anything else."""
    if len(numbers) == 4:
        return Source(*numbers)
    *own, (sha256, first_epoch, counts) = numbers
    return Source(*own, Remap(sha256, first_epoch, tuple(counts)))


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


def _mixture(fields: dict) -> Mixture:
    """Raises CheckpointError where sources or stages are not what `to_json` writes."""
    try:
        sources = tuple(map(_source, fields["sources"]))
        stages = tuple(Stage(position, tuple(weights), tuple(starts)) for position, weights, starts in fields["stages"])
        counts = [n for source in sources for n in (source.num_samples, source.block_samples)]
        counts += [n for stage in stages for n in (stage.position, *stage.weights, *stage.starts)]
        names = [name for source in sources for name in (source.name, source.fingerprint)]
        if not all(type(n) is int and n >= 0 for n in counts) or not all(type(name) is str for name in names):
            raise ValueError("expected names and whole numbers")
        if not sources or any(len(stage.weights) > len(sources) for stage in stages):
            raise ValueError(f"expected weights of {len(sources)} sources at most, and one at least")
        mixture = Mixture(fields["seed"], fields["blocks_per_window"], sources, stages)
        replace(mixture, sources=tuple(replace(source, remap=NO_REMAP) for source in sources)).order()
    except (TypeError, ValueError, PlanError) as error:
        raise CheckpointError(f"The resume state's sources or stages are damaged ({error}). {_REMEDY}") from error
    return mixture


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
