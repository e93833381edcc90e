"""Ranks that make no progress are named after the limit of their phase, and no sooner."""

import pytest

from megatron_keye.train.supervise.heartbeats import MARGIN_S, Beat, StallWatch, parse_beat

HANG_S, SLOW_S = 60.0, 1800.0


def watch() -> StallWatch:
    return StallWatch(HANG_S, SLOW_S, now_s=0.0)


@pytest.mark.parametrize(("text", "beat"), [("12 99.5 step\n", Beat(12, "step")), ("", None), ("x 1 step", None), ("12 99.5", None)])
def test_a_heartbeat_is_read_or_not_believed(text, beat):
    assert parse_beat(text) == beat


def test_no_heartbeat_at_all():
    observer = watch()
    assert observer.look({}, SLOW_S) == []
    assert observer.look({}, SLOW_S + MARGIN_S + 1) == ["no rank"]


@pytest.mark.parametrize("phase", ["setup", "load", "save", "eval", "step"])
def test_slow_phases_and_the_first_step_have_time(phase):
    observer = watch()
    beats = {"rank0": f"0 1.0 {phase}"}
    assert observer.look(beats, 10.0) == []
    assert observer.look(beats, 10.0 + SLOW_S) == []
    assert observer.look(beats, 11.0 + SLOW_S + MARGIN_S) == ["rank0"]


def run_steps(observer: StallWatch, step_s: float) -> float:
    """Three steps of `step_s` of two ranks; when the last was seen."""
    for step in range(4):
        assert observer.look({"rank0": f"{step} 0 step", "rank1": f"{step} 0 step"}, step * step_s) == []
    return 3 * step_s


@pytest.mark.parametrize(("step_s", "limit_s"), [(1.0, HANG_S), (19.0, HANG_S), (100.0, 300.0)])
def test_a_step_may_take_three_times_the_longest_before_it(step_s, limit_s):
    observer = watch()
    since_s = run_steps(observer, step_s)
    for rank0 in ("3 0 step", "4 1 step"):
        assert observer.look({"rank0": rank0, "rank1": "3 0 step"}, since_s + limit_s + MARGIN_S) == []
    assert observer.look({"rank0": "4 1 step", "rank1": "3 0 step"}, since_s + limit_s + MARGIN_S + 1) == ["rank1"]


def test_steps_between_two_looks_count_each():
    """Looks are rarer than steps: five steps in 100 s are 20 s each, not one of 100 s."""
    observer = watch()
    observer.look({"rank0": "0 0 step"}, 0.0)
    observer.look({"rank0": "5 0 step"}, 100.0)
    assert observer.look({"rank0": "5 0 step"}, 100.0 + HANG_S + MARGIN_S + 1) == ["rank0"]


def test_loading_is_no_step():
    observer = watch()
    observer.look({"rank0": "0 0 load"}, 0.0)
    observer.look({"rank0": "40 0 step"}, 500.0)
    assert observer.look({"rank0": "40 0 step"}, 500.0 + 1600) == [], "its first step warms up"


def test_only_the_observers_clock_counts():
    """The rank's own time is years off and does not even advance."""
    observer = watch()
    for step in range(5):
        assert observer.look({"rank0": f"{step} 4e9 step"}, step * 10.0) == []
