"""Held-out loss and exact-answer accuracy per task, beside a blind baseline and chance.

An answer counts as exact when every one of its tokens, the end of turn included, is the most probable one given those before it:
then, and only then, greedy decoding writes exactly that answer. One forward pass shows it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_keye.data.dataset import Dataset
from megatron_keye.train.inference import Blinded, Samples, SampleScore, Scorer

OTHER = "(no task)"


@dataclass
class TaskResult:
    """Sums over the samples of one task. `exact` and `blind_exact` count samples among the `answered`, which have an answer."""

    samples: int = 0
    answered: int = 0
    tokens: int = 0
    nll_sum: float = 0.0
    exact: int = 0
    blind_exact: int = 0
    chance: float | None = None

    def fields(self) -> dict[str, float | int | None]:
        accuracies = {"accuracy": self.exact, "blind_accuracy": self.blind_exact}
        rates = {name: count / self.answered if self.answered else None for name, count in accuracies.items()}
        return {"samples": self.samples, "loss": self.nll_sum / max(self.tokens, 1), **rates, "chance": self.chance}


def evaluate(scorer: Scorer, dataset: Dataset, advance: Callable[[], None]) -> dict[str, TaskResult]:
    """Results by task, in the order of first appearance; `advance` is called after every sample of both passes."""
    results: dict[str, TaskResult] = {}
    answered = set()
    for sample, score in _scored(scorer, dataset, advance):
        result = results.setdefault(dataset.task(sample) or OTHER, TaskResult())
        result.samples += 1
        result.tokens += len(score.logprobs)
        result.nll_sum -= float(score.logprobs.sum(dtype="float64"))
        if dataset.answer(sample) is not None:
            answered.add(sample)
            result.answered += 1
            result.exact += is_exact(score)
    for sample, score in _scored(scorer, Blinded(dataset), advance):
        results[dataset.task(sample) or OTHER].blind_exact += sample in answered and is_exact(score)
    return results


def is_exact(score: SampleScore) -> bool:
    """Whether greedy decoding writes the answer; not where there is nothing to write."""
    return bool(len(score.is_top) and score.is_top.all())


def _scored(scorer: Scorer, samples: Samples, advance: Callable[[], None]) -> Iterator[tuple[int, SampleScore]]:
    for sample, score in scorer.scores(samples):
        yield sample, score
        advance()


def chance_levels(folder: str | Path) -> dict[str, float | None]:
    """Chance per task from `tasks.json` beside a data set, as the demo data has it; empty without one."""
    path = Path(folder).parent / "tasks.json"
    if not path.is_file():
        return {}
    return {task: entry.get("chance") for task, entry in json.loads(path.read_text(encoding="utf-8")).items()}
