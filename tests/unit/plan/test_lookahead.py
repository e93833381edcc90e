"""A window is divided into equal batches, gathers giants, keeps growth within its bound, and is the same everywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.errors import PlanError
from megatron_keye.plan.cost import CostModel
from megatron_keye.plan.lookahead import Lookahead, divide_window

COST = CostModel(1, 0, 0, 0, 0)


def int64(values):
    return np.array(values, np.int64)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 30), st.integers(100, 400), st.data())
def test_every_step_gets_as_many_samples(batches, batch_samples, replicas, growth, data):
    costs = int64(data.draw(st.lists(st.integers(0, 10**15), min_size=batches * batch_samples, max_size=batches * batch_samples)))
    lookahead = Lookahead(batches, replicas, growth, COST)
    steps = divide_window(costs, lookahead, b"key")
    assert np.bincount(steps, minlength=batches).tolist() == [batch_samples] * batches
    assert (divide_window(costs.copy(), lookahead, b"key") == steps).all()


def long_tailed(count, seed):
    rng = np.random.default_rng(seed)
    return np.minimum(rng.lognormal(12, 1.6, count), 1.2e7).astype(np.int64)


def time_over_ideal(costs, steps, batches, replicas):
    """Each step waits for its largest sample or for all its work divided by the replicas."""
    times = [max(costs[steps == k].sum() / replicas, costs[steps == k].max()) for k in range(batches)]
    return sum(times) / (costs.sum() / replicas)


@pytest.mark.parametrize("seed", range(5))
def test_giants_meet_and_time_is_near_ideal(seed):
    batches, replicas = 8, 64
    costs = long_tailed(batches * replicas * 8, seed)
    alone = time_over_ideal(costs, np.arange(len(costs)) // (replicas * 8), batches, replicas)
    together = time_over_ideal(costs, divide_window(costs, Lookahead(batches, replicas, 300, COST), b""), batches, replicas)
    assert together < 1.05 < 1.5 < alone


@pytest.mark.parametrize("growth", [110, 150, 200])
def test_growth_of_a_step_is_bounded(growth):
    costs = long_tailed(8 * 512, 1)
    steps = divide_window(costs, Lookahead(8, 64, growth, COST), b"")
    work = [costs[steps == k].sum() for k in range(8)]
    assert max(work) <= costs.sum() / 8 * growth / 100
    assert max(work) > costs.sum() / 8 * (growth - 5) / 100


def test_without_giants_steps_are_alike():
    costs = long_tailed(8 * 512, 2)
    steps = divide_window(costs, Lookahead(8, 1, 200, COST), b"")
    work = [costs[steps == k].sum() for k in range(8)]
    assert max(work) < 1.001 * min(work)


def test_the_step_of_the_giants_differs_by_window():
    costs = long_tailed(8 * 512, 3)
    places = {int(divide_window(costs, Lookahead(8, 64, 200, COST), bytes([key]))[costs.argmax()]) for key in range(40)}
    assert places == set(range(8))


def test_a_window_of_other_size_is_refused():
    with pytest.raises(PlanError, match="equal batches"):
        divide_window(int64([1, 2, 3]), Lookahead(2, 1, 200, COST), b"")


@pytest.mark.parametrize(
    "settings", [{"batches": 0}, {"canonical_replicas": 0}, {"growth_percent": 99}, {"batches": 2, "cost": None}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(PlanError, match=next(reversed(settings))):
        Lookahead(**settings)
