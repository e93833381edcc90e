"""The ledger of a run: which samples every step trained on, in a form that can be proved from the file alone (`ledger_proof.py`).

One JSON object per line. A `segment` line says how positions of the order become samples from its step on; a new one follows where
that changes. A `step` line says what one step took. Each line ends in `chain`, the SHA-256 of the `chain` before it and of its own
other fields, so no line can be changed, moved or left out without a trace. A checkpoint stores the `chain` of the last line before it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from megatron_keye.errors import LedgerError
from megatron_keye.plan.lookahead import Lookahead
from megatron_keye.plan.mixture import Mixture

CHAIN_START = bytes(32).hex()
"""The chain before the first line of a run."""

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""SHA-256, hexadecimal."""
Runs = tuple[tuple[Count, Annotated[int, Field(gt=0)]], ...]


class Entry(BaseModel):
    """Frozen and strict: unknown fields and other types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Rules(Entry):
    """All that decides which samples a step takes, besides the steps before it."""

    mixture: Mixture
    """The order: sources with their fingerprints, and weights since position `mixture.stages[0].position`."""
    global_batch_samples: Annotated[int, Field(gt=0)]
    lookahead: Lookahead
    plan_version: int

    def since(self, position: int) -> "Rules":
        """The same rules for steps that take positions from `position` on."""
        return self.model_copy(update={"mixture": self.mixture.since(position)})


class SegmentLine(Entry):
    """Steps from `step` on follow `rules`."""

    kind: Literal["segment"] = "segment"
    step: Count
    position: Count
    """Samples taken before it."""
    digest: Digest
    """The cursor's digest before it."""
    after: Digest
    """The chain before it: in the first line of a file, that of the checkpoint from which the run went on."""
    rules: Rules
    chain: Digest


class Skipped(Entry):
    """A sample of the step that could not be read and had no part in the loss."""

    sample: Count
    id: str
    source: str
    reason: str


@dataclass
class SourceCounts:
    """Samples that a run has taken, and those of them that could not be read, by source."""

    taken: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)

    def add(self, taken: Mapping[str, int], skipped: Iterable[Skipped]) -> None:
        """Count one step more."""
        self.taken.update(taken)
        self.bad.update(sample.source for sample in skipped)


class StepLine(Entry):
    """What one step took. `samples`, `ids` and `crc32` have one entry per slot, in plan order."""

    kind: Literal["step"] = "step"
    step: Count
    positions: Runs
    """Of the slots, as (first, count)."""
    epochs: Runs
    """Of the slots, as (epoch, count): how often the sample's source had been gone through before."""
    samples: tuple[Count, ...]
    """Numbers in the dataset."""
    ids: tuple[str, ...]
    crc32: tuple[Count, ...]
    """Of the records as stored. A record holds the SHA-256 of each of its media; that of media at web addresses is added to it."""
    sources: dict[str, Count]
    """Samples from each source."""
    skipped: tuple[Skipped, ...]
    updated: bool
    """Whether weights moved: not with a gradient that is not finite, nor without supervised tokens."""
    digest: Digest
    """The cursor's digest after it."""
    chain: Digest

    @property
    def slot_positions(self) -> list[int]:
        return [position for first, count in self.positions for position in range(first, first + count)]

    @property
    def slot_epochs(self) -> list[int]:
        return [epoch for epoch, count in self.epochs for _ in range(count)]


Line = SegmentLine | StepLine
_LINE = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def parse_line(text: bytes) -> Line:
    """Raises LedgerError where `text` is not a whole line of a ledger."""
    try:
        return _LINE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        raise LedgerError(f"it is not a line of a ledger: {where}: {first['msg']}; it is torn or was edited") from error


def line_text(line: Line) -> str:
    """The inverse of `parse_line`, with a line end."""
    return line.model_dump_json() + "\n"


def chained(line: Line, previous: str) -> Line:
    """`line` with the chain that follows on `previous`; the one that it has is not looked at."""
    own = line.model_dump_json(exclude={"chain"}).encode()
    return line.model_copy(update={"chain": hashlib.sha256(bytes.fromhex(previous) + own).hexdigest()})


def position_runs(positions: Iterable[int]) -> Runs:
    """`positions` as (first, count) of consecutive ones, in the given order."""
    runs = groupby(enumerate(positions), lambda pair: pair[1] - pair[0])
    members = ([position for _, position in run] for _, run in runs)
    return tuple((run[0], len(run)) for run in members)


def value_runs(values: Sequence[int]) -> Runs:
    """`values` as (value, count) of equal neighbours."""
    return tuple((value, len(list(run))) for value, run in groupby(values))
