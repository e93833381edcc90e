"""Drift and speeds of ranks from measured and predicted times."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.plan.pace import GREATEST_SPEED, LEAST_SPEED, SPEED_STEP, drift, rank_speeds

PREDICTED = np.random.default_rng(0).uniform(0.5, 2.0, (11, 6))


def test_drift_is_measured_over_predicted_and_takes_no_notice_of_one_bad_step():
    measured = PREDICTED * 1.3
    measured[4] *= 50
    assert drift(measured, PREDICTED) == pytest.approx(1.3)


def test_ranks_without_work_do_not_count():
    predicted = PREDICTED.copy()
    predicted[:, 0] = 0.0
    predicted[3] = 0.0
    measured = predicted * 0.8
    measured[:, 0] = 7.0
    assert drift(measured, predicted) == pytest.approx(0.8)
    assert rank_speeds(measured, predicted) == (1000,) * 6
    assert math.isnan(drift(measured, predicted * 0))
    assert rank_speeds(measured, predicted * 0) == (1000,) * 6


def test_a_slow_rank_shows_whatever_the_unit_and_in_spite_of_noise():
    noise = np.exp(np.random.default_rng(1).normal(0.0, 0.05, PREDICTED.shape))
    measured = PREDICTED * noise / np.array([1.0, 1.0, 0.7, 1.0, 1.0, 1.0])
    measured[5, 1] *= 100
    for unit in (1.0, 1e12):
        assert rank_speeds(measured, PREDICTED * unit) == (1000, 1000, 700, 1000, 1000, 1000)


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=9))
def test_speeds_are_quantized_and_bounded(factors):
    predicted = np.ones((3, len(factors)))
    for speed in rank_speeds(predicted / np.array(factors), predicted):
        assert LEAST_SPEED <= speed <= GREATEST_SPEED
        assert speed % SPEED_STEP == 0


def test_little_work_does_not_make_a_rank_slow():
    predicted = np.ones((5, 4))
    predicted[:, 3] = 0.1
    measured = predicted + 0.5
    assert rank_speeds(measured, predicted) == (1000,) * 4
