"""What may go wrong how often before a run ends. Everything counted is the same on all ranks, so all of them end together."""

import math
from collections.abc import Mapping, Sequence

from megatron_keye.config.schema import BadSampleBudget, TrainConfig
from megatron_keye.errors import DataError, NumericError
from megatron_keye.plan.ledger import Skipped, SourceCounts

NUM_EXAMPLES = 3


class FiniteSteps:
    """Steps since the last start whose gradient was not finite."""

    def __init__(self, settings: TrainConfig):
        self._limit, self._count = settings.max_nonfinite_steps, 0

    def count(self, grad_norm: float) -> None:
        """Raises NumericError where the limit is passed."""
        self._count += int(not math.isfinite(grad_norm))
        if self._count > self._limit:
            raise NumericError(
                f"{self._count} steps had gradients that were not finite, and train.max_nonfinite_steps is {self._limit}; "
                "lower optimizer.lr, or look at the samples of those steps in ledger.jsonl"
            )


class BadSamples:
    """Samples of each source that could not be read, over the whole run."""

    def __init__(self, budget: BadSampleBudget, sizes: Mapping[str, int], counts: SourceCounts):
        """`sizes` are the samples that each source has; `counts` are those of the run so far, and go on from there."""
        self._budget, self._sizes, self._counts = budget, sizes, counts
        self._examples: dict[str, list[str]] = {}

    def count(self, taken: Mapping[str, int], skipped: Sequence[Skipped]) -> None:
        """One step's samples by source, and those left out. Raises DataError where a source has spent its budget."""
        self._counts.add(taken, skipped)
        for sample in skipped:
            self._examples.setdefault(sample.source, []).append(f"{sample.id} ({sample.reason})")
        for source in sorted(self._examples):
            self._check(source)

    def _check(self, source: str) -> None:
        taken, bad, size = self._counts.taken[source], self._counts.bad[source], self._sizes[source]
        self._examples[source] = self._examples[source][-NUM_EXAMPLES:]
        examples = f"the latest: {'; '.join(self._examples[source])}. ledger.jsonl names each"
        if bad == taken >= size:
            raise DataError(f"no sample of source {source!r} could be read, {bad} of {taken} failed, {examples}: repair it or leave it out")
        budget = self._budget
        if bad > budget.max_count and bad > budget.max_fraction * taken:
            raise DataError(
                f"{bad} of {taken} samples of source {source!r} could not be read, and data.bad_sample_budget allows {budget.max_count}, "
                f"or {100 * budget.max_fraction:g} % of them; {examples}: repair the data, or raise max_count or max_fraction"
            )
