"""Evaluation: what counts as exact, per task, seen and blind."""

import json

import numpy as np
import pytest

from megatron_keye.train.evaluate import OTHER, chance_levels, evaluate, is_exact
from megatron_keye.train.inference import Blinded, SampleScore


def score(*is_top, logprob=-0.5):
    return SampleScore(np.full(len(is_top), logprob, dtype=np.float32), np.array(is_top, dtype=bool))


class FakeSet:
    """Samples as (task, answer, score seen, score blind)."""

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def task(self, sample):
        return self.samples[sample][0]

    def answer(self, sample):
        return self.samples[sample][1]

    def pixels(self, sample):
        return [np.arange(588, dtype=np.uint8).reshape(1, 588)]

    shape = tokens = sample_id = task


class FakeScorer:
    def scores(self, samples):
        blind = isinstance(samples, Blinded)
        inner = samples.sample_id.__self__ if blind else samples
        yield from ((number, entry[3 if blind else 2]) for number, entry in enumerate(inner.samples))


RIGHT, WRONG, NOTHING = score(True, True, True), score(True, False, True), score()


@pytest.mark.parametrize(
    ("scored", "exact"),
    [(RIGHT, True), (score(True), True), (WRONG, False), (score(True, True, False), False), (score(False), False), (NOTHING, False)],
)
def test_every_token_up_to_the_end_of_turn_must_be_the_most_probable(scored, exact):
    assert is_exact(scored) is exact


def test_results_by_task_in_order_of_appearance():
    ticks = []
    dataset = FakeSet(
        ("shape", "a square", RIGHT, WRONG),
        ("caption", None, RIGHT, RIGHT),
        ("shape", "a circle", WRONG, WRONG),
        (None, "x", RIGHT, RIGHT),
        ("shape", "a star", RIGHT, RIGHT),
    )
    results = evaluate(FakeScorer(), dataset, lambda: ticks.append(1))
    assert list(results) == ["shape", "caption", OTHER]
    shape = results["shape"].fields()
    assert shape == {"samples": 3, "loss": 0.5, "accuracy": 2 / 3, "blind_accuracy": 1 / 3, "chance": None}
    assert results["caption"].fields()["accuracy"] is None
    assert results["caption"].fields()["blind_accuracy"] is None
    assert len(ticks) == 2 * len(dataset)


def test_samples_without_an_answer_do_not_lower_the_accuracy_of_those_with_one():
    dataset = FakeSet(("mixed", "yes", RIGHT, WRONG), ("mixed", None, RIGHT, RIGHT), ("mixed", None, WRONG, RIGHT))
    fields = evaluate(FakeScorer(), dataset, lambda: None)["mixed"].fields()
    assert (fields["samples"], fields["accuracy"], fields["blind_accuracy"]) == (3, 1.0, 0.0)


def test_the_loss_is_a_mean_over_tokens_not_samples():
    dataset = FakeSet(("t", "a", score(True, logprob=-2.0), RIGHT), ("t", "b", score(True, True, True, logprob=-1.0), RIGHT))
    assert evaluate(FakeScorer(), dataset, lambda: None)["t"].fields()["loss"] == pytest.approx(5 / 4)


def test_blind_samples_are_grey_and_otherwise_the_same():
    dataset = FakeSet(("t", "a", RIGHT, WRONG))
    blind = Blinded(dataset)
    assert len(blind) == 1
    (patches,) = blind.pixels(0)
    assert patches.shape == (1, 588) and patches.dtype == np.uint8 and (patches == 128).all()


def test_chance_levels_lie_beside_the_set(tmp_path):
    assert chance_levels(tmp_path / "valid") == {}
    (tmp_path / "tasks.json").write_text(json.dumps({"shape": {"chance": 0.25}, "caption": {"chance": None}}))
    assert chance_levels(tmp_path / "valid") == {"shape": 0.25, "caption": None}
