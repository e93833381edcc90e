"""What uses CPU nodes: I/O servers, in a job of their own or in the run's, that are lost with their nodes; conversion and evaluation."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, Drill

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster"), io_nodes=2) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def whole_cluster(cluster):
    """Every drill leaves all nodes up, and idle."""
    yield
    cluster.boot_lost_nodes()
    cluster.run("scancel", "--me")
    cluster.wait_until_idle()


def lease_ends_s(registry: Path) -> float:
    """When the newest lease of a server runs out; 0 without one."""
    return max((json.loads(file.read_text())["expires_s"] for file in registry.glob("*.json")), default=0.0)


def served(drill: Drill, registry: Path) -> int:
    """Images and videos that the servers of a registry have decoded, by their own counters."""
    asking = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1] + '/metrics', timeout=5).read().decode())"
    urls = [json.loads(file.read_text())["url"] for file in registry.glob("*.json")]
    said = "".join(drill.cluster.run(sys.executable, "-c", asking, url, check=False) for url in urls)
    return sum(int(float(count)) for count in re.findall(r"^keye_io_decoded_total\S* (\S+)$", said, re.MULTILINE))


@pytest.mark.slow
def test_an_io_server_is_lost_and_comes_back(drill: Drill, tiny, undisturbed, tmp_path):
    """The run decodes by itself meanwhile: not one step differs, and no attempt fails."""
    registry = tmp_path / "io"
    drill.run_script("io_servers.sh", "--registry", registry, "--root", tiny.folder, "--partition", "io", "--cpus", "1")
    drill.wait_until(lambda: lease_ends_s(registry) > 0, "the server")
    media = ("data.media.deadline_s=2", "data.media.hedge_after_s=0.5", f"data.media.secret_file={registry / 'secret'}")
    job = drill.submit("--set", f"data.media.registry={registry}", *media)
    drill.wait_for_step(30)
    lost_s = lease_ends_s(registry)
    drill.cluster.crash("io1")
    drill.wait_for_step(60)
    drill.cluster.boot("io1")
    drill.wait_until(lambda: lease_ends_s(registry) > lost_s + 10, "the server again")
    drill.wait_for_end_of(job)
    assert drill.causes() == ["done"]
    assert "media from servers" in drill.log()
    drill.assert_like(undisturbed)


def test_a_run_brings_its_io_servers_with_it(drill: Drill, undisturbed):
    """A heterogeneous job: both components start, go back to the queue and end as one."""
    registry = drill.run_dir.path / "io_servers"
    job = drill.submit("--io-nodes", "1")
    assert f"is already in job {job}\n" in drill.launch("--io-nodes", "1")
    drill.wait_until(lambda: served(drill, registry) > 0, "pixels from the server")
    drill.cluster.run("scancel", "--batch", "--signal=USR1", job)
    drill.wait_until(lambda: drill.causes() == ["time_limit"], "the end of the attempt")
    drill.wait_until_done()
    drill.wait_for_end_of(job)
    drill.wait_for_end_of(str(int(job) + 1))
    assert drill.causes() == ["time_limit", "done"]
    assert drill.log().count("media from servers") == 2, "the servers come back with the job"
    drill.assert_like(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("io_nodes", [1, 2])
def test_a_server_node_of_a_heterogeneous_job_is_lost(drill: Drill, io_nodes):
    """SLURM starts the whole job again: the ranks save, as they do before any requeue."""
    job = drill.submit("--io-nodes", str(io_nodes), "--set", "train.steps=100000")
    drill.wait_for_step(30)
    drill.cluster.crash("io1")
    drill.wait_until(lambda: drill.causes() == ["requeued"], "the requeue")
    (ending,) = drill.endings()
    assert ending.saved_step == ending.last_step
    drill.cluster.boot("io1")
    drill.wait_until(lambda: len(drill.attempts()) == 2, "the next attempt")
    assert drill.attempts()[1].first_step == ending.last_step
    assert drill.attempts()[1].job == job


@pytest.mark.slow
def test_evaluation_and_conversion_as_jobs(drill: Drill, undisturbed, tmp_path):
    def run(script: str, *arguments: str | Path) -> str:
        in_folder = ("bash", "-ec", 'cd "$1"; shift; "$@"', "bash", tmp_path)
        said = drill.cluster.run(*in_folder, ROOT / "launch" / script, *arguments, environment={"KEYE_SITE": str(drill.site)})
        drill.wait_for_end_of(job := said.strip())
        (log,) = tmp_path.glob(f"*-{job}.log")
        assert drill.cluster.job(job, "JobState") == "COMPLETED", log.read_text()
        return log.read_text()

    assert "loss" in run("eval.sbatch", "--run-dir", undisturbed.path)
    assert "step" in run("convert.sbatch", "inspect", undisturbed.path)
