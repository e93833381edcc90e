"""Proving from ledgers and checkpoints alone that a run took every position of its order exactly once, and finding where two runs
differ. Lines stream through; what is kept are the positions of open lookahead windows."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, takewhile, zip_longest

import numpy as np

from megatron_keye.errors import LedgerError, PlanError
from megatron_keye.plan.digest import LEDGER_START, ledger_digest
from megatron_keye.plan.ledger import CHAIN_START, Line, Rules, SegmentLine, StepLine, chained
from megatron_keye.plan.mixture import Mixture, Source, Standing, continued
from megatron_keye.plan.remap import Due, nothing_due
from megatron_keye.plan.windows import Progress


@dataclass(frozen=True, slots=True)
class SavedPoint:
    """What a checkpoint says of the ledger: `steps` are in its weights, `digest` is its cursor's, `chain` that of the last line."""

    name: str
    steps: int
    digest: str
    chain: str


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The ledger and checkpoints of one run directory, and what was due where data changed."""

    name: str
    lines: Iterable[Line]
    saved: Sequence[SavedPoint]
    due: Due = nothing_due


@dataclass(slots=True)
class TakenPositions:
    """A set of positions that grows nearly in order: all below `base`, and those in `ahead`."""

    base: int = 0
    ahead: set[int] = field(default_factory=set)

    def add(self, positions: Iterable[int]) -> int | None:
        """Add them; the first one that was there before, or None."""
        for position in positions:
            if position < self.base or position in self.ahead:
                return position
            self.ahead.add(position)
            while self.base in self.ahead:
                self.ahead.remove(self.base)
                self.base += 1
        return None

    def missing(self, end: int) -> list[int]:
        """Positions below `end` that are not in the set."""
        return [position for position in range(self.base, end) if position not in self.ahead]

    @property
    def end(self) -> int:
        """One more than the highest."""
        return max(self.ahead, default=self.base - 1) + 1


class Proof:
    """Takes the lines of a run one after another, each checked against all before it."""

    def __init__(self) -> None:
        self.steps = self.segments = self.epochs = self.num_skipped = 0
        self.agreeing: list[SavedPoint] = []
        self.taken = TakenPositions()
        self.digest, self.chain = LEDGER_START.hex(), CHAIN_START
        self._rules: Rules | None = None
        self._progress = Progress()
        self._used: Counter[tuple[int, int]] = Counter()
        """Samples used, by source and epoch."""

    @property
    def num_samples(self) -> int:
        return self._progress.position

    @property
    def open_positions(self) -> list[int]:
        """What lookahead windows in progress have left for later steps."""
        return self.taken.missing(self._progress.frontier)

    @property
    def rules(self) -> Rules:
        """Those of the last segment."""
        if self._rules is None:
            raise LedgerError("no segment line stands before it, expected one first")
        return self._rules

    def standings(self) -> list[Standing]:
        """How far each source has come."""
        return self.rules.mixture.standings(self._order, self._progress.frontier, self.open_positions)

    def take(self, line: Line, due: Due = nothing_due) -> None:
        """Raises LedgerError, with the first thing that is wrong with the line."""
        if line.step != self.steps:
            raise LedgerError(f"it is about step {line.step}, expected step {self.steps}: lines are missing, repeated or out of order")
        if isinstance(line, SegmentLine):
            self._take_segment(line, due)
        else:
            self._take_step(line)
        expected = chained(line, self.chain).chain
        if line.chain != expected:
            raise LedgerError(f"its chain is {line.chain[:12]}..., its fields and the line before give {expected[:12]}...: one was changed")
        self.chain = line.chain

    def compare(self, saved: SavedPoint) -> None:
        """Raises LedgerError unless a checkpoint after `steps` steps holds these samples."""
        for name, here, there in (("digest of the samples", self.digest, saved.digest), ("chain", self.chain, saved.chain)):
            if here != there:
                raise LedgerError(
                    f"after {self.steps} steps the ledger's {name} is {here[:12]}..., that of checkpoint {saved.name} is {there[:12]}...: "
                    "they are not of one run, or one was changed"
                )
        self.agreeing.append(saved)

    def _take_segment(self, line: SegmentLine, due: Due) -> None:
        found, expected = (line.position, line.digest, line.after), (self.num_samples, self.digest, self.chain)
        for name, value, wanted in zip(("position", "digest", "after"), found, expected, strict=True):
            if value != wanted:
                raise LedgerError(f"its {name} is {value}, the lines before it give {wanted}: it does not go on where they end")
        if self._rules is not None:
            self._check_mixture(self._rules.mixture, line.rules.mixture)
        self._rules = line.rules
        try:
            self._order = line.rules.mixture.order(due)
        except PlanError as error:
            raise LedgerError(f"its mixture gives no order: {error}") from error
        self.segments += 1

    def _check_mixture(self, before: Mixture, now: Mixture) -> None:
        """Positions mean what they did, and each source goes on in its own order from the place that it had reached."""
        renewed = self._remapped(before, now.sources[: len(before.sources)])
        wanted = replace(now, stages=now.stages[-1:])
        try:
            expected = continued(renewed, wanted, self._progress.frontier).since(self._progress.base)
        except PlanError as error:
            raise LedgerError(f"its mixture does not go on with the one before: {error}") from error
        if now != expected:
            raise LedgerError(f"the stages of its mixture are {now.stages}, those of the one before give {expected.stages}")

    def _remapped(self, before: Mixture, sources: tuple[Source, ...]) -> Mixture:
        """The mixture before, but with `sources` where data changed; windows in progress are then given up."""
        same_names = [source.name for source in sources] == [source.name for source in before.sources]
        same_data = all((a.fingerprint, a.remap) == (b.fingerprint, b.remap) for a, b in zip(before.sources, sources, strict=False))
        if same_data or not same_names:
            return before
        standings = self.standings()
        for number, (was, source, standing) in enumerate(zip(before.sources, sources, standings, strict=True)):
            if source != was or standing.is_open:
                self._check_remap(number, was, source, standing)
        renewed = before.remapped(sources, self._progress.position, standings)
        self._progress = Progress(self._progress.position)
        self.taken = TakenPositions(self._progress.position)
        return renewed

    def _check_remap(self, number: int, before: Source, source: Source, standing: Standing) -> None:
        """All that an epoch in progress has not used is due: none is left out but as many as were used."""
        epochs, remap = standing.epochs_in_progress(before), source.remap
        if (remap.first_epoch, remap.end_epoch) != (epochs.start, epochs.stop):
            if source == before:
                raise LedgerError(f"data changed while a window had samples of source {before.name} left, and they are not made due again")
            raise LedgerError(
                f"its mixture does not go on with the one before: source {source.name} has fingerprint {source.fingerprint:.12}, but had "
                f"{before.fingerprint:.12}; its new order begins with what is due from epoch {remap.first_epoch} on and is whole from "
                f"{remap.end_epoch} on, expected {epochs.start} and {epochs.stop}"
            )
        for epoch, count in zip(epochs, remap.counts, strict=True):
            left_out, used = source.num_samples - count, self._used[number, epoch]
            if not 0 <= left_out <= used:
                raise LedgerError(
                    f"{count} of {source.num_samples} samples of source {source.name} are due in epoch {epoch}, and it has used {used}"
                )

    def _take_step(self, line: StepLine) -> None:
        self._check_slots(line, self.rules)
        self._check_positions(line, self.rules)
        positions = np.array(line.slot_positions, np.int64)
        _check_equal("samples", line.samples, self._order(positions).tolist(), "the order gives")
        sources, epochs = (numbers.tolist() for numbers in self.rules.mixture.sources_and_epochs(self._order, positions))
        _check_equal("epochs", line.slot_epochs, epochs, "its positions give")
        self._used.update(zip(sources, epochs, strict=True))
        digest = ledger_digest(bytes.fromhex(self.digest), line.samples).hex()
        if line.digest != digest:
            raise LedgerError(f"its digest is {line.digest[:12]}..., its samples and the step before give {digest[:12]}...")
        self.digest, self.steps = digest, self.steps + 1
        self.num_skipped += len(line.skipped)
        self.epochs = max([self.epochs, *(epoch + 1 for epoch, _ in line.epochs)])

    def _check_slots(self, line: StepLine, rules: Rules) -> None:
        counts = {
            "positions": sum(count for _, count in line.positions),
            "epochs": sum(count for _, count in line.epochs),
            "samples": len(line.samples),
            "ids": len(line.ids),
            "crc32": len(line.crc32),
            "sources": sum(line.sources.values()),
        }
        for name, count in counts.items():
            if count != rules.global_batch_samples:
                raise LedgerError(f"it has {count} {name}, expected the global batch of {rules.global_batch_samples}")
        absent = [skipped.id for skipped in line.skipped if skipped.sample not in line.samples]
        if absent:
            raise LedgerError(f"it skips {absent[0]}, which is not one of its samples")

    def _check_positions(self, line: StepLine, rules: Rules) -> None:
        """None twice, and none left out but what the lookahead window in progress still has."""
        repeated = self.taken.add(line.slot_positions)
        if repeated is not None:
            raise LedgerError(f"it takes position {repeated}, which was taken before")
        self._progress = self._progress.under(rules.global_batch_samples, rules.lookahead).after_step()
        end = self._progress.frontier
        if self.taken.end > end:
            first = self.taken.missing(end)[0]
            raise LedgerError(
                f"it takes position {self.taken.end - 1} while position {first} is left out, expected only positions below {end}"
            )


def prove(runs: Sequence[RunFiles]) -> Proof:
    """The proof of a run that went on from each of `runs` in the next, from its first step to its last.

    What a run did after the step from which the next one went on is no part of it. Raises LedgerError with the place and the first
    thing that is wrong.
    """
    proof = Proof()
    parts = [_Part(run) for run in runs]
    ends = [part.first_step for part in parts[1:]]
    for part, end_step in zip(parts, [*ends, None], strict=True):
        part.prove(proof, end_step)
    return proof


class _Part:
    """One run directory's part of a proof."""

    def __init__(self, run: RunFiles):
        self._name, self._lines, self._due = run.name, iter(run.lines), run.due
        first = next(self._lines, None)
        if first is None:
            raise LedgerError(f"{run.name} has no whole line, expected a segment line and those of its steps")
        self._first, self.first_step = first, first.step
        # What was copied from before the first step is for the ledger of that time to prove.
        self._saved = sorted((point for point in run.saved if point.steps >= first.step), key=lambda point: point.steps)

    def prove(self, proof: Proof, end_step: int | None) -> None:
        """Take the lines before `end_step` (None for all), and compare each checkpoint with the line that it follows on."""
        if self.first_step > proof.steps:
            raise LedgerError(f"{self._name} begins at step {self.first_step}, expected step {proof.steps}: name the run before it first")
        saved = [point for point in self._saved if end_step is None or point.steps <= end_step]
        saved = self._compare(proof, saved)
        for number, line in enumerate(self._before(end_step), start=1):
            try:
                proof.take(line, self._due)
            except LedgerError as error:
                raise LedgerError(f"{self._name}, line {number}, step {line.step}: {error}") from error
            if isinstance(line, StepLine):
                saved = self._compare(proof, saved)
        if saved:
            raise LedgerError(
                f"{self._name} ends after {proof.steps} steps, but checkpoint {saved[-1].name} holds {saved[-1].steps}: lines were lost"
            )

    def _before(self, end_step: int | None) -> Iterator[Line]:
        return takewhile(lambda line: end_step is None or line.step < end_step, chain((self._first,), self._lines))

    def _compare(self, proof: Proof, saved: list[SavedPoint]) -> list[SavedPoint]:
        """Compare the checkpoints of this moment; those that are left."""
        for point in saved:
            if point.steps == proof.steps:
                proof.compare(point)
        return [point for point in saved if point.steps > proof.steps]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing in which two runs differ. `slot` is None for what concerns the whole step."""

    step: int
    slot: int | None
    name: str
    first: str
    second: str


def first_difference(first: Iterable[Line], second: Iterable[Line]) -> Difference | None:
    """Where two runs first took other samples, left out others, or differ in whether weights moved; None where they are alike."""
    for one, other in zip_longest(_steps(first), _steps(second)):
        if one is None or other is None:
            here = (one or other).step
            return Difference(here, None, "step", *("missing" if line is None else "there" for line in (one, other)))
        found = _step_difference(one, other)
        if found is not None:
            return found
    return None


def _steps(lines: Iterable[Line]) -> Iterator[StepLine]:
    return (line for line in lines if isinstance(line, StepLine))


def _step_difference(one: StepLine, other: StepLine) -> Difference | None:
    if one.step != other.step:
        return Difference(min(one.step, other.step), None, "step", str(one.step), str(other.step))
    columns = [
        (name, getattr(one, attribute), getattr(other, attribute))
        for name, attribute in (("id", "ids"), ("sample", "samples"), ("position", "slot_positions"), ("crc32", "crc32"))
    ]
    for slot in range(max(len(one.samples), len(other.samples))):
        for name, here, there in columns:
            pair = [str(values[slot]) if slot < len(values) else "missing" for values in (here, there)]
            if pair[0] != pair[1]:
                return Difference(one.step, slot, name, *pair)
    if one.skipped != other.skipped:
        ids = (", ".join(skipped.id for skipped in line.skipped) or "none" for line in (one, other))
        return Difference(one.step, None, "skipped", *ids)
    if one.updated != other.updated:
        return Difference(one.step, None, "updated", str(one.updated), str(other.updated))
    return None


def _check_equal(name: str, found: Sequence[int], expected: Sequence[int], whose: str) -> None:
    for slot, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        if value != wanted:
            raise LedgerError(f"slot {slot} of its {name} is {value}, {whose} {wanted}")
