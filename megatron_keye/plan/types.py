"""The step plan: everything decided about one optimizer step before anything is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from megatron_keye.contract.media import SampleShape
from megatron_keye.plan.assignment import Assignment, StepCosts


@dataclass(frozen=True, slots=True)
class Document:
    """A sample at its place in a packed row. `sample` is its number in the index; `start` its offset in the row, in
    tokens; `padded_tokens` its length there, a multiple of the run's padding."""

    sample: int
    shape: SampleShape
    start: int
    padded_tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row: documents one after another without gaps. A row without documents is one run of padding."""

    documents: tuple[Document, ...]
    num_tokens: int

    @property
    def cu_seqlens(self) -> list[int]:
        """Boundaries of the padded documents, [0, ..., num_tokens]."""
        return [0, *(d.start + d.padded_tokens for d in self.documents)] if self.documents else [0, self.num_tokens]


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """One attention segment and who encodes it: `encoder` is a rank within the replica, `round` counts that rank's
    rounds. The segment is `rows[microbatch].documents[document].shape.segments[segment]`."""

    microbatch: int
    document: int
    segment: int
    encoder: int
    round: int


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """One replica's share of a step: a row per microbatch, and its attention segments over its encoder ranks.

    Tasks are ordered by (encoder, round, microbatch, document, segment); `num_rounds` is the largest of any encoder,
    and every rank takes part in that many, with nothing to encode in some.
    """

    rows: tuple[Row, ...]
    tasks: tuple[EncodeTask, ...]
    num_rounds: int


class Replicas(Sequence[ReplicaPlan]):
    """The replicas' plans of a step, each worked out when it is first asked for: a rank needs its own alone."""

    def __init__(self, number: int, plan_of: Callable[[int], ReplicaPlan]):
        self._number, self._plan_of = number, cache(plan_of)

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, replica: int) -> ReplicaPlan:
        if not 0 <= replica < self._number:
            raise IndexError(f"replica {replica} of {self._number}")
        return self._plan_of(replica)

    def mapped(self, change: Callable[[ReplicaPlan], ReplicaPlan]) -> "Replicas":
        """These plans, each with a change."""
        return Replicas(self._number, lambda replica: change(self[replica]))


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One optimizer step. `positions` are the places in the endless order that it takes and `members` the samples there, the same at
    every layout; the rest is placement."""

    step: int
    positions: tuple[int, ...]
    members: tuple[int, ...]
    costs: StepCosts
    assignment: Assignment
    replicas: Replicas
