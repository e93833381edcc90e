"""A run with the settings and SLURM's times that people have who set nothing: how soon it notices, and that it grows again."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from megatron_keye.config.load import dump_config, load_config
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Drill

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

NOTICED_WITHIN_S = 60.0
LOOK_S = 3.0
"""One step of the tiny run, and what a busy machine takes to write and to look."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """SLURM's own default: a node that does not answer belongs to the job for five minutes more."""
    with Cluster(tmp_path_factory.mktemp("cluster"), slurmd_timeout_s=300) as cluster:
        yield cluster


@pytest.fixture
def unlimited(drill: Drill, tiny, tmp_path) -> Drill:
    """A run without an end, with the limits of time that the recipes ship."""
    config = tiny.config("train.steps=100000", "train.save_every_steps=20")
    assert config.train.hang_timeout_s == load_config("keye_vl_1_5_8b").train.hang_timeout_s == NOTICED_WITHIN_S
    path = tmp_path / "unlimited.yaml"
    path.write_text(dump_config(config))
    return replace(drill, settings=path)


def seconds_until(drill: Drill, condition: Callable[[], bool], what: str) -> float:
    began_s = time.monotonic()
    drill.wait_until(condition, what)
    return time.monotonic() - began_s


def test_a_dead_rank_is_noticed_within_a_minute(unlimited: Drill):
    unlimited.submit()
    unlimited.wait_for_step(30)
    (worker,) = unlimited.ranks_on("gpu2")
    os.kill(worker, signal.SIGKILL)
    noticed_s = seconds_until(unlimited, lambda: unlimited.causes() == ["crash"], "the end of the attempt")
    print(f"a dead rank: the attempt had ended after {noticed_s:.1f} s")
    assert noticed_s < NOTICED_WITHIN_S
    assert unlimited.endings()[0].culprit == "gpu2"


def test_a_rank_that_hangs_is_noticed_within_a_minute(unlimited: Drill):
    """The stopped rank can do nothing. The other one waits for it, says where, and ends; its launcher and srun end what is left."""
    run_dir = unlimited.run_dir.path
    places = (run_dir / "stacks/rank0", run_dir / "attempts/0001/stacks/rank0")
    unlimited.submit()
    unlimited.wait_for_step(30)
    (worker,) = unlimited.ranks_on("gpu2")
    os.kill(worker, signal.SIGSTOP)
    written_s = seconds_until(unlimited, lambda: any(path.exists() and path.stat().st_size for path in places), "the stacks")
    ended_s = written_s + seconds_until(unlimited, lambda: unlimited.causes() == ["hang"], "the end of the attempt")
    print(f"a rank that hangs: stacks after {written_s:.1f} s, the attempt had ended after {ended_s:.1f} s")
    assert written_s < NOTICED_WITHIN_S + LOOK_S
    assert places[1].read_text().startswith("Timeout")
    unlimited.wait_until(lambda: len(unlimited.attempts()) == 2, "the next attempt")
    assert worker not in unlimited.cluster.processes("gpu2")


def test_a_run_that_shrank_grows_again(drill: Drill, undisturbed):
    """A node that froze is left behind, and taken back by the next attempt once it answers."""
    drill.submit("--min-nodes", "1")
    drill.wait_for_step(30)
    drill.cluster.freeze("gpu2")
    try:
        drill.wait_until(lambda: len(drill.attempts()) == 2, "an attempt without the node")
    finally:
        drill.cluster.thaw("gpu2")
    drill.wait_for_step(50)
    (worker,) = drill.ranks_on("gpu1")
    os.kill(worker, signal.SIGKILL)
    drill.wait_until_done()
    drill.wait_until(lambda: drill.causes() == ["lost_node", "crash", "done"], "the end")
    assert [attempt.nodes for attempt in drill.attempts()] == [("gpu1", "gpu2"), ("gpu1",), ("gpu1", "gpu2")]
    assert len({attempt.job for attempt in drill.attempts()}) == 1, "all in one job"
    drill.assert_little_lost()
    drill.assert_close_to(undisturbed)
