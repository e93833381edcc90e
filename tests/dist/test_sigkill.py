"""A launched run that is killed without warning and started again, against one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_keye.config.load import dump_config
from megatron_keye.plan.ledger_proof import prove
from megatron_keye.train.ledger import run_files
from megatron_keye.train.run_dir import RunDir
from tests.tiny import losses

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
LIMIT_S = 120


def start(settings, path):
    """Two ranks through the launcher, in a process group of their own."""
    command = [str(ROOT / "launch/local.sh"), "-n", "2", str(settings), "--run-dir", str(path)]
    log = path.with_suffix(".log").open("a")
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def ranks_of(launched):
    """Process ids of the ranks; each leads a process group of its own."""
    listed = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def kill_when(condition, launched, only_launcher=False):
    """SIGKILL to the launcher, and to every rank, at once when `condition` holds. Fails if the run ends before."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert launched.poll() is None and time.monotonic() < deadline
        time.sleep(0.0005)
    doomed = [launched.pid] if only_launcher else [*ranks_of(launched), launched.pid]
    assert len(doomed) == (1 if only_launcher else 3)
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    launched.wait()


def num_steps(path):
    metrics = RunDir(path).metrics
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def is_saving(path):
    return any(RunDir(path).checkpoints.glob(".*.incomplete"))


@pytest.mark.slow
def test_a_killed_run_has_the_loss_curve_of_an_undisturbed_one(tiny, tmp_path):
    """Killed after a random number of steps, then in a save; then the launcher alone, whose ranks must give way to the next start."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(dump_config(tiny.config(f"train.steps={STEPS}", "train.save_every_steps=3")))
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start(settings, straight).wait(timeout=LIMIT_S) == 0

    rng = random.Random(5)
    first, second, third = sorted(rng.sample(range(2, STEPS - 8), 3))
    kill_when(lambda: num_steps(killed) >= first, start(settings, killed))
    kill_when(lambda: num_steps(killed) >= second and is_saving(killed), start(settings, killed))
    assert is_saving(killed), "what the save left behind"
    kill_when(lambda: num_steps(killed) >= third, start(settings, killed), only_launcher=True)
    assert not RunDir(killed).is_done
    assert start(settings, killed).wait(timeout=LIMIT_S) == 0

    assert losses(killed) == losses(straight)
    assert RunDir(killed).ledger.read_text() == RunDir(straight).ledger.read_text()
    assert prove([run_files(killed)]).steps == STEPS
    assert not is_saving(killed)
