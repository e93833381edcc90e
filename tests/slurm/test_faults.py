"""What is wrong from the start: bad nodes, taken ports, programs that cannot even be imported; and chains of runs."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.supervise.attempt import FIRST_PORT, NUM_PORTS
from megatron_keye.train.supervise.decide import GIVEN_UP
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, Drill, write_site
from tests.tiny import losses

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One node more than a run needs."""
    with Cluster(tmp_path_factory.mktemp("cluster"), gpu_nodes=3) as cluster:
        yield cluster


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """A file system of its own at `folder`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_preflight_leaves_out_a_bad_node(drill: Drill, undisturbed):
    """A node cannot write to the run directory: the run moves to others, and what waits for it waits on."""
    drill.run_dir.path.mkdir()
    drill.cluster.make_read_only("gpu2", drill.run_dir.path)
    job = drill.submit("--preflight", "full", "--spare-nodes", "0")
    waiting = drill.cluster.run("sbatch", "--parsable", f"--dependency=afterok:{job}", "--wrap", "true").strip()
    drill.wait_until(lambda: drill.causes() == ["bad_node"], "the verdict")
    (ending,) = drill.endings()
    assert ending.bad_nodes == ("gpu2",)
    assert "gpu2: the run directory cannot be written" in ending.error
    drill.wait_until(lambda: drill.causes() == ["bad_node", "done"], "the end")
    assert drill.attempts()[1].nodes == ("gpu1", "gpu3")
    assert "preflight: all 2 nodes are fit" in drill.log()
    drill.wait_for_end_of(waiting)
    assert drill.cluster.job(waiting, "JobState") == "COMPLETED"
    drill.assert_like(undisturbed)


def test_preflight_by_hand(drill: Drill):
    size = ("--nodes=2", "--gpus-per-node=1")
    script = (ROOT / "launch/preflight.sh", drill.settings, *size, "--run-dir", drill.run_dir.path, "--preflight", "full")
    said = drill.cluster.run("salloc", "--quiet", *size, *script, environment={"KEYE_SITE": str(drill.site)})
    assert [line for line in said.splitlines() if line.startswith("gpu")] == ["gpu1: fit", "gpu2: fit"]


@pytest.mark.slow
def test_a_port_that_is_taken(drill: Drill, undisturbed):
    """Somebody listens where the first attempt of the next job would meet."""
    last = drill.cluster.run("sbatch", "--parsable", "--wrap", "true").strip()
    listener = drill.cluster.occupy_port("gpu1", FIRST_PORT + ((int(last) + 1) * 37 + 1) % NUM_PORTS)
    try:
        job = drill.submit()
        assert int(job) == int(last) + 1
        drill.wait_for_end_of(job)
    finally:
        listener.kill()
    assert drill.causes() == ["done"]
    drill.assert_like(undisturbed)


NO_TORCH = ("torch.py", "raise ImportError('libcudart.so.13: cannot open shared object file')\n", "libcudart.so.13: cannot open")
NO_MEGATRON = (
    "sitecustomize.py",
    "import os, sys\nif os.environ.get('RANK') == '1':\n    sys.modules['megatron'] = None\n",
    "No module named 'megatron.core'",
)


@pytest.mark.parametrize(("file", "code", "error"), [NO_TORCH, NO_MEGATRON], ids=["launcher", "one rank"])
def test_what_cannot_be_imported_ends_with_a_diagnosis(drill: Drill, tmp_path, file, code, error):
    """The same error again and again, on another node too: after three attempts nobody tries any more."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / file).write_text(code)
    drill.site.write_text(drill.site.read_text() + f"PYTHONPATH={tmp_path / 'broken'}\n")
    drill.submit()
    diagnosis = drill.run_dir.path / "failure.json"
    drill.wait_until(diagnosis.exists, "the diagnosis")
    last = drill.attempts()[-1]
    drill.wait_for_end_of(last.job)
    assert drill.cluster.job(last.job, "ExitCode") == f"{GIVEN_UP}:0"
    assert drill.causes() == ["crash"] * 3
    failure = json.loads(diagnosis.read_text())
    assert error in failure["error"]
    assert any(error in line for line in failure["last_lines"])
    assert failure["last_step"] == 0
    if file == NO_MEGATRON[0]:
        assert failure["first_failure"]["rank"] == 1
        assert [ending.culprit for ending in drill.endings()] == ["gpu2", "gpu2", "gpu3"]


def test_a_chain_submitted_twice(drill: Drill, tmp_path):
    """The second stage starts from the weights of the first, and nothing runs twice."""
    chain = tmp_path / "chain.yaml"
    size = "--nodes 2 --gpus-per-node 1 --preflight off --lead-s 30 --set train.steps=20"
    stages = [{"name": name, "settings": str(drill.settings)} for name in ("one", "two")]
    chain.write_text(yaml.safe_dump({"runs": str(tmp_path / "runs"), "options": size, "stages": stages}))

    def submit() -> list[str]:
        return drill.run_script("pretrain_chain.sh", chain).splitlines()

    jobs = [line.split()[1].rstrip(":") for line in submit()]
    assert [line.rpartition(" ")[2] for line in submit()] == jobs, "already in these jobs"
    assert drill.cluster.job(jobs[1], "JobState") == "PENDING"
    one, two = (RunDir(tmp_path / "runs" / name) for name in ("one", "two"))
    drill.wait_until(lambda: two.is_done, "the second stage")
    assert min(losses(two.path).values()) < min(losses(one.path).values())
    assert f"the weights come from {one.path}" in (two.path / "train.log").read_text()
    assert all("is complete" in line for line in submit())


@pytest.mark.slow
def test_a_disk_that_runs_full_during_a_save(undisturbed, settings, tmp_path):
    """The last good checkpoint stays, the run tries again, and goes on once there is room."""
    folder = tmp_path / "small"
    one_checkpoint = sum(file.stat().st_size for file in next(undisturbed.checkpoints.iterdir()).iterdir())
    with small_disk(folder, 12 * one_checkpoint), Cluster(tmp_path / "cluster") as cluster:
        drill = Drill(cluster, settings, RunDir(folder / "run"), write_site(tmp_path))
        ballast = folder / "ballast"
        drill.submit("--backoff-s", "10")
        drill.wait_for_step(25)
        ballast.write_bytes(bytes(int(8.5 * one_checkpoint)))
        drill.wait_until(lambda: "again in this job" in drill.log(), "the failed save")
        ballast.unlink()
        drill.wait_until_done()
        drill.wait_until(lambda: drill.causes()[-1] == "done", "the end")
        assert set(drill.causes()[:-1]) == {"disk_full"}
        assert drill.endings()[0].saved_step > 0
        drill.assert_like(undisturbed)
