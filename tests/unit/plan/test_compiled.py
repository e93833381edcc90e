"""Compiled and interpreted kernels give the same answer to the last bit, and numba is optional."""

import numpy as np
import pytest

from megatron_keye.plan import compiled, spread
from megatron_keye.plan.assignment import AssignmentRules, StepCosts, assign_samples
from megatron_keye.plan.compiled import Kernel


def random_costs(count, seed):
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.lognormal(6, 1.2, count), 8192).astype(np.int64)
    vision = np.where(rng.random(count) < 0.4, 0, rng.lognormal(14, 1, count)).astype(np.int64)
    return StepCosts(tokens, vision // 100, 1000 * tokens + tokens**2 // 8, vision)


@pytest.mark.parametrize("barrier", ["step", "phase", "microbatch"])
@pytest.mark.parametrize("num_replicas", [3, 200])
def test_both_ways_give_the_same_assignment(barrier, num_replicas, monkeypatch):
    pytest.importorskip("numba")
    costs = random_costs(6 * num_replicas, seed=num_replicas)
    speeds = tuple(1000 - 7 * (replica % 3) for replica in range(num_replicas))
    rules = AssignmentRules(num_replicas, 8192, 2, barrier, speeds, replica_patches=int(costs.patches.sum() / num_replicas * 1.1))
    answers = []
    for threshold in (0, 1 << 62):
        monkeypatch.setattr(compiled, "COMPILED_FROM_STEPS", threshold)
        monkeypatch.setattr(spread, "_FULL_SCAN_STEPS", 200 * 200)
        answer = assign_samples(costs, rules)
        answers.append((answer.replica.tolist(), None if answer.row is None else answer.row.tolist(), answer.num_rows))
    assert answers[0] == answers[1]


def _double(values, pair, factor):
    for i in range(len(values)):
        values[i] *= factor
        pair[0][i] += pair[1][i]


def test_arrays_are_changed_in_place_either_way():
    def run(steps):
        values, pair = np.arange(3), (np.arange(3), np.ones(3, np.int64))
        Kernel(_double)(steps, values, pair, 5)
        return values.tolist(), pair[0].tolist()

    assert run(0) == run(1 << 62) == ([0, 5, 10], [1, 2, 3])


def test_numba_is_optional(monkeypatch):
    monkeypatch.setattr(compiled, "has_numba", lambda: False)
    monkeypatch.setattr(Kernel, "compiled", None)
    values, pair = np.arange(3), (np.arange(3), np.ones(3, np.int64))
    Kernel(_double)(1 << 62, values, pair, 5)
    assert values.tolist() == [0, 5, 10]


def test_small_work_does_not_load_numba(monkeypatch):
    monkeypatch.setattr(Kernel, "compiled", None)
    costs = random_costs(64, seed=0)
    for barrier in ("step", "phase", "microbatch"):
        assign_samples(costs, AssignmentRules(4, 8192, 1, barrier))
