"""Held-out loss and exact-answer accuracy per task, beside a blind baseline and chance.

An answer counts as exact when every one of its tokens, the end of turn included, is the most probable one given those before it:
then, and only then, greedy decoding writes exactly that answer. One forward pass shows it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_keye.data.dataset import Dataset
from megatron_keye.train.inference import Blinded, Samples, Scorer

OTHER = "(no task)"


@dataclass
class TaskResult:
    """Sums over the samples of one task. `exact` and `blind_exact` count samples; tasks without answers have none."""

    samples: int = 0
    tokens: int = 0
    nll_sum: float = 0.0
    exact: int = 0
    blind_exact: int = 0
    has_answers: bool = False
    chance: float | None = None

    def fields(self) -> dict[str, float | int | None]:
        accuracies = {"accuracy": self.exact, "blind_accuracy": self.blind_exact}
        rates = {name: count / self.samples if self.has_answers else None for name, count in accuracies.items()}
        return {"samples": self.samples, "loss": self.nll_sum / max(self.tokens, 1), **rates, "chance": self.chance}


def evaluate(scorer: Scorer, dataset: Dataset, advance: Callable[[], None]) -> dict[str, TaskResult]:
    """Results by task, in the order of first appearance; `advance` is called after every sample of both passes."""
    results: dict[str, TaskResult] = {}
    for sample, score in _scored(scorer, dataset, advance):
        result = results.setdefault(dataset.task(sample) or OTHER, TaskResult())
        result.samples += 1
        result.tokens += len(score.logprobs)
        result.nll_sum -= float(score.logprobs.sum(dtype="float64"))
        result.exact += bool(score.is_top.all())
        result.has_answers |= dataset.answer(sample) is not None
    for sample, score in _scored(scorer, Blinded(dataset), advance):
        results[dataset.task(sample) or OTHER].blind_exact += bool(score.is_top.all())
    return results


def _scored(scorer: Scorer, samples: Samples, advance: Callable[[], None]):
    for sample, score in scorer.scores(samples):
        yield sample, score
        advance()


def chance_levels(folder: str | Path) -> dict[str, float | None]:
    """Chance per task from `tasks.json` beside a data set, as the demo data has it; empty without one."""
    path = Path(folder).parent / "tasks.json"
    if not path.is_file():
        return {}
    return {task: entry.get("chance") for task, entry in json.loads(path.read_text(encoding="utf-8")).items()}
