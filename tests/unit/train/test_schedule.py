"""The learning rate over steps."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.config.load import load_config
from megatron_keye.train.schedule import lr_factor


def settings(steps, warmup_steps, min_lr_ratio=0.1, decay_steps=None):
    config = load_config("debug")
    optimizer = config.optimizer.model_copy(
        update={"warmup_steps": warmup_steps, "min_lr_ratio": min_lr_ratio, "decay_steps": decay_steps}
    )
    return config.model_copy(update={"optimizer": optimizer, "train": config.train.model_copy(update={"steps": steps})})


def test_warmup_is_linear_and_its_first_step_trains():
    config = settings(steps=100, warmup_steps=4)
    assert [lr_factor(step, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_decay_is_a_cosine_from_the_peak_to_the_minimum():
    config = settings(steps=110, warmup_steps=10, min_lr_ratio=0.2)
    assert lr_factor(10, config) == 1.0
    assert lr_factor(60, config) == pytest.approx(0.2 + 0.8 / 2)
    assert lr_factor(35, config) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert lr_factor(110, config) == pytest.approx(0.2)


def test_decay_steps_count_from_the_start_of_the_run_and_the_minimum_stays():
    config = settings(steps=1000, warmup_steps=10, min_lr_ratio=0.0, decay_steps=50)
    assert lr_factor(30, config) == pytest.approx(0.5)
    assert [lr_factor(step, config) for step in (50, 51, 999)] == [0.0, 0.0, 0.0]


def test_a_run_may_end_within_its_warmup():
    config = settings(steps=5, warmup_steps=20)
    assert [lr_factor(step, config) for step in range(5)] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])


@given(st.integers(1, 60), st.integers(0, 80), st.floats(0.0, 1.0), st.none() | st.integers(1, 90))
def test_it_rises_then_falls_between_its_bounds(steps, warmup_steps, min_lr_ratio, decay_steps):
    config = settings(steps, warmup_steps, min_lr_ratio, decay_steps)
    factors = [lr_factor(step, config) for step in range(100)]
    assert all(0.0 < factor <= 1.0 for factor in factors[:warmup_steps])
    assert all(min_lr_ratio - 1e-12 <= factor <= 1.0 for factor in factors[warmup_steps:])
    assert all(a < b for a, b in pairwise(factors[:warmup_steps]))
    assert all(a >= b - 1e-12 for a, b in pairwise(factors[max(warmup_steps - 1, 0) :]))
