"""How a stopped run goes on with changed data: what is still due follows from its checkpoint, its ledger and the new index."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from megatron_keye.checkpoint.manifest import RunRecord, read_manifest
from megatron_keye.checkpoint.store import latest_good
from megatron_keye.data.mixture import MixedDataset
from megatron_keye.errors import CheckpointError, LedgerError, SettingsError
from megatron_keye.plan.changed_data import Changes, UsedSamples, changes, used_samples
from megatron_keye.plan.cursor import Cursor, ResumeState
from megatron_keye.plan.ledger import Line
from megatron_keye.plan.ledger_proof import Proof, SavedPoint
from megatron_keye.plan.mixture import Mixture, Source
from megatron_keye.plan.remap import Remap, due_samples
from megatron_keye.train.ledger import read_ledger
from megatron_keye.train.remaps import Remaps, due_file
from megatron_keye.train.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class RemappedSource:
    """A source that begins a new order, and how its data changed; `before` is the source as it was."""

    before: Source
    source: Source
    changes: Changes


@dataclass(frozen=True, slots=True)
class RemapPlan:
    """All that a remap is: `state` takes the place of the resume state `saved`, and `due` are its files by hash."""

    checkpoint: Path
    saved: str
    state: ResumeState
    sources: tuple[RemappedSource, ...]
    due: dict[str, bytes]


def plan_remap(run: RunDir, dataset: MixedDataset, wanted: Mixture, on_bytes: Callable[[int], None]) -> RemapPlan:
    """How the run goes on from its newest good checkpoint with the samples of `dataset`, in the order that is `wanted` of them.

    Reads the ledger twice; `on_bytes` is told the bytes of each line. Raises CheckpointError where there is no checkpoint to go on from
    or more than data changed, LedgerError where the ledger does not prove what was used, SettingsError where no data changed.
    """
    checkpoint, record = _newest_good(run)
    state = ResumeState.from_json(record.resume_state)
    now = _new_sources(state, wanted, checkpoint)
    ledger = _Ledger(run, state.cursor, on_bytes)
    standings = ledger.proved(SavedPoint(checkpoint.name, state.cursor.step, state.cursor.ledger.hex(), record.ledger)).standings()
    epochs = [standing.epochs_in_progress(source) for standing, source in zip(standings, state.mixture.sources, strict=True)]
    used = used_samples(ledger.lines(), ledger.due, epochs)
    sources, remapped, due = list(state.mixture.sources), [], {}
    for number, (before, source) in enumerate(zip(state.mixture.sources, now, strict=True)):
        if source.fingerprint != before.fingerprint or standings[number].is_open:
            sources[number], content, found = _remapped(dataset, wanted, number, epochs[number], used[number])
            remapped.append(RemappedSource(before, sources[number], found))
            due[sources[number].remap.sha256] = content
    after = state.remapped(sources, standings)
    after.going_on(wanted)
    return RemapPlan(checkpoint, record.resume_state, after, tuple(remapped), due)


class _Ledger:
    """The lines of a run's ledger before a checkpoint."""

    def __init__(self, run: RunDir, cursor: Cursor, on_bytes: Callable[[int], None]):
        self.due = Remaps(run).due
        self._path, self._num_steps, self._on_bytes = run.ledger, cursor.step, on_bytes

    def lines(self) -> Iterator[Line]:
        return takewhile(lambda line: line.step < self._num_steps, read_ledger(self._path, self._on_bytes))

    def proved(self, saved: SavedPoint) -> Proof:
        """Raises LedgerError where the lines do not prove what the checkpoint holds."""
        proof = Proof()
        try:
            for line in self.lines():
                proof.take(line, self.due)
            if proof.steps != self._num_steps:
                raise LedgerError(f"it ends after {proof.steps} steps, expected the {self._num_steps} of checkpoint {saved.name}")
            proof.compare(saved)
        except LedgerError as error:
            raise LedgerError(
                f"{self._path} does not prove what was used, and no remap can be made without: {error}. Restore the ledger from step 0 on"
            ) from error
        return proof


def _newest_good(run: RunDir) -> tuple[Path, RunRecord]:
    checkpoint, _ = latest_good(run.checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"{run.checkpoints} holds no good checkpoint, so no sample is used up: start the run with the new data")
    return checkpoint, read_manifest(checkpoint).run


def _new_sources(state: ResumeState, wanted: Mixture, checkpoint: Path) -> tuple[Source, ...]:
    """What the run's sources are now."""
    before = state.mixture.sources
    now = wanted.sources[: len(before)]
    if [source.name for source in now] != [source.name for source in before]:
        raise CheckpointError(
            f"the sources are {[source.name for source in now]}, but those of {checkpoint} were {[source.name for source in before]}: keep "
            "their names and their order; a remap is for other data under the same name"
        )
    if all(source.fingerprint == was.fingerprint for source, was in zip(now, before, strict=True)):
        raise SettingsError(
            f"the data is what {checkpoint} was trained on, so there is nothing to remap: start the run again, or name other data by --data"
        )
    return now


def _remapped(dataset: MixedDataset, wanted: Mixture, number: int, epochs: range, used: UsedSamples) -> tuple[Source, bytes, Changes]:
    """A source that begins its new order, the file of what is due, and how its data changed."""
    samples, counts = due_samples(wanted.whole_epochs(number), epochs, dataset.records(number), used.by_epoch)
    sha256, content = due_file(samples)
    source = replace(wanted.sources[number], remap=Remap(sha256, epochs.start, counts))
    return source, content, changes(used, dataset.records(number), counts)
