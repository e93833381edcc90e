"""The step plan: everything decided about one optimizer step before anything is read."""

from dataclasses import dataclass

from megatron_keye.contract.media import SampleShape


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


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step. `members` are the samples in plan order, the same at every layout; `replicas` is placement."""

    step: int
    members: tuple[int, ...]
    replicas: tuple[ReplicaPlan, ...]
