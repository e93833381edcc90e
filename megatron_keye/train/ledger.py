"""The ledger file of a run: written by the main rank as steps end, cut back to the checkpoint at each start, read as a stream.

A step's line is written before the checkpoint that holds the step, and flushed to disk before that checkpoint is committed. So
whenever a run is killed, its ledger reaches at least as far as its newest checkpoint; what it holds beyond is taken again.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_keye.checkpoint.files import flush_folder
from megatron_keye.checkpoint.manifest import read_manifest
from megatron_keye.checkpoint.store import checkpoints
from megatron_keye.config.schema import RunConfig
from megatron_keye.data.loader import SkippedSample
from megatron_keye.errors import LedgerError
from megatron_keye.plan.cursor import PLAN_VERSION, Cursor, ResumeState
from megatron_keye.plan.ledger import (
    CHAIN_START,
    Line,
    Rules,
    SegmentLine,
    Skipped,
    SourceCounts,
    StepLine,
    chained,
    line_text,
    parse_line,
    position_runs,
    value_runs,
)
from megatron_keye.plan.ledger_proof import RunFiles, SavedPoint
from megatron_keye.plan.mixture import Mixture
from megatron_keye.plan.remap import Due, nothing_due
from megatron_keye.plan.types import StepPlan
from megatron_keye.train.placement import plan_settings
from megatron_keye.train.remaps import Remaps
from megatron_keye.train.run_dir import RunDir, writing


class StoredSamples(Protocol):
    """The part of a dataset that a ledger names."""

    def sample_id(self, sample: int) -> str: ...

    def record_crc32(self, sample: int) -> int: ...

    def source(self, sample: int) -> str: ...


@dataclass
class _Kept:
    """The lines of steps before a checkpoint."""

    num_bytes: int = 0
    chain: str | None = None
    rules: Rules | None = None
    counts: SourceCounts = field(default_factory=SourceCounts)


class LedgerWriter:
    """Appends the steps of a run from `cursor` on. Only the main rank has one."""

    def __init__(
        self, path: Path, dataset: StoredSamples, rules: Rules, cursor: Cursor, saved_chain: str, due: Due = nothing_due
    ):  # fmt: skip
        """Drops the lines of steps from `cursor` on, which will be taken again, and opens a segment where `rules` are new.

        `saved_chain` is that of the checkpoint which the run goes on from. Raises LedgerError, and changes nothing, where the file
        does not lead to that checkpoint; where there is no file, a new one goes on from it.
        """
        self._path, self._dataset, self._rules = path, dataset, rules
        self._order = rules.mixture.order(due)
        kept = _lines_before(path, cursor.step)
        if cursor.step and kept.chain != saved_chain and path.exists() and path.stat().st_size:
            raise LedgerError(
                f"{path} does not lead to the checkpoint after {cursor.step} steps: lines were lost or changed. Restore it, or move it "
                "away: then a new ledger begins at the checkpoint, and nothing proves what was trained on before"
            )
        self.continues_elsewhere = cursor.step > 0 and kept.chain is None
        """Whether the first steps of the run are in the ledger of another directory, or in none."""
        self.chain = saved_chain if kept.chain is None else kept.chain
        self.counts = kept.counts
        if path.exists():
            os.truncate(path, kept.num_bytes)
        if kept.rules is None or kept.rules.since(cursor.progress.base) != rules:
            self._append(SegmentLine(
                step=cursor.step, position=cursor.position, digest=cursor.ledger.hex(), after=self.chain, rules=rules, chain=CHAIN_START
            ))  # fmt: skip

    def step(self, plan: StepPlan, after: Cursor, skipped: Sequence[Skipped], updated: bool) -> None:
        """Append the line of a step, with those of its samples that were left out. Raises KeyeError where it cannot be written."""
        dataset, positions = self._dataset, np.array(plan.positions, np.int64)
        line = StepLine(
            step=plan.step,
            positions=position_runs(plan.positions),
            epochs=value_runs(self._rules.mixture.epochs(self._order, positions).tolist()),
            samples=plan.members,
            ids=tuple(map(dataset.sample_id, plan.members)),
            crc32=tuple(map(dataset.record_crc32, plan.members)),
            sources=Counter(map(dataset.source, plan.members)),
            skipped=tuple(skipped),
            updated=updated,
            digest=after.ledger.hex(),
            chain=CHAIN_START,
        )
        self._append(line)

    def flush(self) -> None:
        """Return when all lines are on disk, as they must be before a checkpoint of their steps is. Raises LedgerError."""
        try:
            with self._path.open("ab") as file:
                os.fsync(file.fileno())
            flush_folder(self._path.parent)
        except OSError as error:
            raise LedgerError(
                f"{self._path} cannot be written to disk ({error.strerror}): make room or repair it, and start again"
            ) from error

    def _append(self, line: Line) -> None:
        line = chained(line, self.chain)
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line_text(line))
        self.chain = line.chain


def left_out(plan: StepPlan, skipped: Iterable[SkippedSample], dataset: StoredSamples) -> list[Skipped]:
    """What a ledger says of the samples that could not be read, in the order of the step's slots, whichever rank met them."""
    reasons = {sample.sample: sample.reason for sample in skipped}
    return [
        Skipped(sample=sample, id=dataset.sample_id(sample), source=dataset.source(sample), reason=reasons[sample])
        for sample in plan.members
        if sample in reasons
    ]


def rules_of(config: RunConfig, mixture: Mixture) -> Rules:
    """What a run with these settings writes at the head of a segment; the layout has no part in it."""
    settings = plan_settings(config, num_replicas=1)
    return Rules(
        mixture=mixture, global_batch_samples=settings.global_batch_samples, lookahead=settings.lookahead, plan_version=PLAN_VERSION
    )


def read_ledger(path: Path, on_bytes: Callable[[int], None] = lambda num_bytes: None) -> Iterator[Line]:
    """The whole lines of a ledger; one that is being written, at its end, is left out.

    `on_bytes` is told the bytes of each. Raises LedgerError for a file that cannot be read and for a line that is none.
    """
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                on_bytes(len(text))
                if not text.endswith(b"\n"):
                    return
                try:
                    yield parse_line(text)
                except LedgerError as error:
                    raise LedgerError(f"{path}, line {number}: {error}") from error
    except OSError as error:
        raise LedgerError(f"cannot read {path} ({error.strerror}); expected the ledger of a run") from error


def run_files(folder: Path, on_bytes: Callable[[int], None] = lambda num_bytes: None) -> RunFiles:
    """What a run directory has to prove with. Raises CheckpointError for a checkpoint whose manifest is damaged."""
    run = RunDir(folder)
    saved = [_saved_point(path) for path in checkpoints(run.checkpoints)]
    return RunFiles(str(run.ledger), read_ledger(run.ledger, on_bytes), saved, Remaps(run).due)


def _saved_point(path: Path) -> SavedPoint:
    record = read_manifest(path).run
    cursor = ResumeState.from_json(record.resume_state).cursor
    return SavedPoint(path.name, cursor.step, cursor.ledger.hex(), record.ledger)


def _lines_before(path: Path, step: int) -> _Kept:
    """The lines before `step`, up to the first that is torn or damaged."""
    kept = _Kept()
    if not path.exists():
        return kept
    with path.open("rb") as file:
        for text in file:
            try:
                line = parse_line(text)
            except LedgerError:
                break
            if line.step >= step or not text.endswith(b"\n"):
                break
            kept.num_bytes += len(text)
            kept.chain = line.chain
            if isinstance(line, SegmentLine):
                kept.rules = line.rules
            else:
                kept.counts.add(line.sources, line.skipped)
    return kept
