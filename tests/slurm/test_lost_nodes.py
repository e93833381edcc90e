"""Nodes that lose power or freeze, against a run that was left alone."""

import time

import pytest

from tests.slurm.conftest import Drill

pytestmark = pytest.mark.slurm
NOTICED_WITHIN_S = 60.0


@pytest.fixture(autouse=True)
def whole_cluster(cluster):
    """Every drill leaves all nodes up."""
    yield
    cluster.boot_lost_nodes()
    for node in cluster.nodes:
        cluster.thaw(node)
    cluster.wait_until_idle()


def test_a_node_loses_power(drill: Drill, undisturbed):
    """The run waits for as many nodes as it needs, and SLURM starts it as soon as they are there."""
    drill.submit()
    drill.wait_for_step(30)
    drill.cluster.crash("gpu2")
    crashed_s = time.monotonic()
    drill.wait_until(lambda: drill.causes() == ["lost_node"], "the end of the attempt")
    assert time.monotonic() - crashed_s < NOTICED_WITHIN_S
    assert drill.endings()[0].lost_nodes == ("gpu2",)
    drill.cluster.boot("gpu2")
    drill.wait_until_done()
    drill.assert_little_lost()
    drill.assert_like(undisturbed)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_nodes(drill: Drill, undisturbed):
    """In the same job, with the same global batch on what is left: the same samples, and the same losses up to rounding."""
    job = drill.submit("--min-nodes", "1")
    drill.wait_for_step(30)
    drill.cluster.crash("gpu2")
    drill.wait_for_end_of(job)
    first, second = drill.attempts()
    assert (first.ending.cause, second.ending.cause) == ("lost_node", "done")
    assert (first.job, first.nodes, second.job, second.nodes) == (job, ("gpu1", "gpu2"), job, ("gpu1",))
    drill.assert_little_lost()
    drill.assert_close_to(undisturbed)


@pytest.mark.slow
def test_a_node_freezes(drill: Drill, undisturbed):
    """Its sockets stay open, so nothing fails: the other rank's watchdog ends the attempt and says where it waited."""
    drill.submit()
    drill.wait_for_step(30)
    drill.cluster.freeze("gpu2")
    frozen_s = time.monotonic()
    drill.wait_until(lambda: len(drill.causes()) == 1, "the end of the attempt")
    assert time.monotonic() - frozen_s < NOTICED_WITHIN_S
    (ending,) = drill.endings()
    assert (ending.cause, ending.lost_nodes) == ("lost_node", ("gpu2",))
    assert "distributed_c10d.py" in (drill.run_dir.path / "attempts/0001/stacks/rank0").read_text()
    drill.cluster.thaw("gpu2")
    drill.wait_until_done()
    drill.assert_little_lost()
    drill.assert_like(undisturbed)


@pytest.mark.slow
def test_the_batch_host_loses_power(drill: Drill, undisturbed):
    """The supervisor is gone too: SLURM starts the job again, and the next supervisor finds out."""
    drill.submit()
    drill.wait_for_step(30)
    drill.cluster.crash("gpu1")
    time.sleep(1)
    drill.cluster.boot("gpu1")
    drill.wait_until(lambda: drill.causes() == ["vanished", "done"], "the end")
    drill.assert_little_lost()
    drill.assert_like(undisturbed)
