"""Budgets of what may go wrong: by source, over restarts."""

import math

import pytest

from megatron_keye.config.schema import BadSampleBudget, TrainConfig
from megatron_keye.errors import DataError, NumericError
from megatron_keye.plan.ledger import Skipped, SourceCounts
from megatron_keye.train.limits import BadSamples, FiniteSteps


def skipped(source, count):
    return [Skipped(sample=number, id=f"{source}{number}", source=source, reason="cut off") for number in range(count)]


def limits(max_count, max_fraction, counts=None):
    budget = BadSampleBudget(max_count=max_count, max_fraction=max_fraction)
    return BadSamples(budget, {"web": 1000, "vqa": 4}, counts or SourceCounts())


def test_a_source_may_lose_as_many_as_either_limit_allows():
    bad = limits(2, 0.1)
    bad.count({"web": 10}, skipped("web", 2))
    bad.count({"web": 20}, skipped("web", 1))
    with pytest.raises(DataError) as caught:
        bad.count({"web": 5, "vqa": 2}, skipped("web", 1))
    assert str(caught.value) == (
        "4 of 35 samples of source 'web' could not be read, and data.bad_sample_budget allows 2, or 10 % of them; "
        "the latest: web1 (cut off); web0 (cut off); web0 (cut off). ledger.jsonl names each: "
        "repair the data, or raise max_count or max_fraction"
    )


def test_sources_have_budgets_of_their_own():
    bad = limits(3, 0.0)
    bad.count({"web": 10, "vqa": 4}, [*skipped("web", 3), *skipped("vqa", 3)])
    with pytest.raises(DataError, match="4 of 11 samples of source 'web'"):
        bad.count({"web": 1}, skipped("web", 1))


def test_counts_of_earlier_starts_are_part_of_it():
    counts = SourceCounts()
    counts.add({"web": 10}, skipped("web", 2))
    with pytest.raises(DataError, match="3 of 11 samples"):
        limits(2, 0.0, counts).count({"web": 1}, skipped("web", 1))


def test_a_source_of_which_nothing_can_be_read_ends_the_run_at_once():
    bad = limits(100, 1.0)
    bad.count({"vqa": 3}, skipped("vqa", 3))
    with pytest.raises(DataError, match="no sample of source 'vqa' could be read, 4 of 4 failed, .*: repair it or leave it out"):
        bad.count({"vqa": 1}, skipped("vqa", 1))


def test_one_good_sample_is_enough():
    bad = limits(100, 1.0)
    bad.count({"vqa": 4}, skipped("vqa", 3))
    bad.count({"vqa": 4}, skipped("vqa", 4))


def test_steps_without_a_finite_gradient_are_counted():
    finite = FiniteSteps(TrainConfig(steps=9, max_nonfinite_steps=1))
    for norm in (1.0, math.inf, 2.0):
        finite.count(norm)
    with pytest.raises(NumericError, match="2 steps had gradients that were not finite, and train.max_nonfinite_steps is 1"):
        finite.count(math.nan)
