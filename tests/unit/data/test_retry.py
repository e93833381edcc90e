"""Trying again: how often, how long in between, and what is not tried again."""

import pytest

from megatron_keye.data.retry import MAX_PAUSE_S, Retries, Transient, longest_pause_s, with_retries


class Action:
    def __init__(self, failures, error=Transient):
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error(f"failure {self.calls}")
        return "done"


@pytest.mark.parametrize("failures", [0, 1, 4])
def test_it_succeeds_within_the_attempts(failures):
    action, pauses = Action(failures), []
    assert with_retries(action, Retries(5, 1.0), pauses.append) == "done"
    assert action.calls == failures + 1
    assert len(pauses) == failures
    assert all(0 <= pause <= 2**n for n, pause in enumerate(pauses))


def test_the_last_failure_is_raised():
    action = Action(9)
    with pytest.raises(Transient, match="failure 3"):
        with_retries(action, Retries(3, 1.0), lambda s: None)
    assert action.calls == 3


def test_other_errors_are_raised_at_once():
    action = Action(9, ValueError)
    with pytest.raises(ValueError, match="failure 1"):
        with_retries(action, Retries(3, 1.0), lambda s: None)
    assert action.calls == 1


def test_pauses_double_up_to_a_limit_and_differ():
    assert [longest_pause_s(Retries(9, 0.5), tries) for tries in (1, 2, 3, 4)] == [0.5, 1.0, 2.0, 4.0]
    assert longest_pause_s(Retries(99, 0.5), 50) == MAX_PAUSE_S
    first, second = [], []
    for pauses in (first, second):
        with_retries(Action(4), Retries(9, 1.0), pauses.append)
    assert not set(first) & set(second)
