"""A rank that hangs ends itself and says where it was."""

import subprocess
import sys

import pytest

from megatron_keye.config.schema import TrainConfig
from megatron_keye.train import watchdog
from megatron_keye.train.watchdog import Watchdog

CONFIG = TrainConfig(steps=1, hang_timeout_s=60.0, slow_phase_timeout_s=1800.0)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("step_s", "limit_s"), [(1.0, 60.0), (100.0, 300.0)])
def test_limits(tmp_path, clock, step_s, limit_s):
    dog = Watchdog(tmp_path / "stacks/rank0", CONFIG)
    try:
        for phase in ("setup", "load", "step"):
            dog.beat(0, phase)
            assert dog.limit_s() == 1800, phase
        clock[0] += step_s
        dog.beat(1, "step")
        assert dog.limit_s() == limit_s
        dog.beat(1, "save")
        assert dog.limit_s() == 1800
        clock[0] += 500.0
        dog.beat(1, "step")
        assert dog.limit_s() == limit_s, "a save is no step"
    finally:
        dog.close()


def test_loading_is_no_step(tmp_path, clock):
    """A run that goes on counts its first step from where it was, so the number of steps jumps while it loads."""
    dog = Watchdog(tmp_path / "stacks/rank0", CONFIG)
    try:
        dog.beat(0, "load")
        clock[0] += 500.0
        dog.beat(40, "step")
        assert dog.limit_s() == 1800
    finally:
        dog.close()


TWO_STEPS = """
import sys, time
from pathlib import Path
from megatron_keye.config.schema import TrainConfig
from megatron_keye.train.watchdog import Watchdog

dog = Watchdog(Path(sys.argv[1]), TrainConfig(steps=1, hang_timeout_s=0.5, slow_phase_timeout_s=60.0))
dog.beat(0, "step")
dog.beat(1, "step")
"""


def after_two_steps(path, code: str) -> int:
    """The exit code of a process that then runs `code`."""
    return subprocess.run([sys.executable, "-c", TWO_STEPS + code, path], check=False, timeout=30).returncode


def test_a_hanging_rank_ends_with_its_stacks(tmp_path):
    assert after_two_steps(tmp_path / "rank0", "def waits_for_ever():\n    time.sleep(600)\nwaits_for_ever()") == 1
    text = (tmp_path / "rank0").read_text()
    assert text.startswith("Timeout")
    assert "in waits_for_ever" in text


def test_a_fatal_signal_leaves_stacks_too(tmp_path):
    assert after_two_steps(tmp_path / "rank0", "import ctypes\ndef reads_null():\n    ctypes.string_at(0)\nreads_null()") < 0
    text = (tmp_path / "rank0").read_text()
    assert text.startswith("Fatal Python error")
    assert "in reads_null" in text


def test_a_closed_watchdog_ends_nothing(tmp_path):
    assert after_two_steps(tmp_path / "rank0", "dog.close()\ntime.sleep(1)") == 0
    assert (tmp_path / "rank0").read_text() == ""
