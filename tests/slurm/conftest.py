"""A cluster for each file of drills, and runs of the tiny model on it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_keye.config.load import dump_config
from megatron_keye.train.run_dir import RunDir
from megatron_keye.train.supervise.decide import Ending
from megatron_keye.train.supervise.journal import Attempt, Journal
from tests.slurm.cluster import Cluster, missing
from tests.tiny import losses

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = 120, 20
LIMIT_S = 240.0
HANG_S = 5.0
ROUNDING = 0.02
"""Of float32, after a hundred steps at a high learning rate."""
OVERRIDES = (f"train.steps={STEPS}", f"train.save_every_steps={SAVE_EVERY}", f"train.hang_timeout_s={HANG_S}", "train.keep_checkpoints=9")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Two nodes with one GPU each. A machine that cannot hold it fails the drills: a skipped drill proves nothing."""
    assert not (lacking := missing()), f"the drills need {', '.join(lacking)}: see docs/slurm.md"
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Sums round alike only in as many threads; by default a rank has as many as its node has cores for it."""


@pytest.fixture(scope="session")
def settings(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(dump_config(tiny.config(*OVERRIDES)))
    return path


@pytest.fixture(scope="session")
def undisturbed(settings, tmp_path_factory) -> RunDir:
    """The same run on two processes, without SLURM."""
    run_dir = RunDir(tmp_path_factory.mktemp("undisturbed") / "run")
    command = [ROOT / "launch/local.sh", "-n", "2", settings, "--run-dir", run_dir.path]
    subprocess.run(command, env={**os.environ, **ONE_THREAD, "PYTHON": sys.executable}, check=True, capture_output=True, timeout=LIMIT_S)
    return run_dir


@dataclass(frozen=True)
class Drill:
    """One run on a cluster."""

    cluster: Cluster
    settings: Path
    run_dir: RunDir
    site: Path

    def launch(self, *options: str, script: str = "train.sh", settings: Path | None = None, check: bool = True) -> str:
        """The output of launch/train.sh for this run, on the login host."""
        size = ("--nodes", "2", "--gpus-per-node", "1", "--run-dir", str(self.run_dir.path))
        limits = ("--preflight", "off", "--backoff-s", "0.5", "--lead-s", "30")
        command = (ROOT / "launch" / script, str(settings or self.settings), *size, *limits, *options)
        return self.cluster.run(*command, environment={"KEYE_SITE": str(self.site), **ONE_THREAD}, check=check)

    def submit(self, *options: str) -> str:
        """The id of the job."""
        said = self.launch(*options)
        assert said.startswith("job "), said
        return said.split()[1].rstrip(":")

    def run_script(self, script: str, *arguments: str | Path) -> str:
        """The output of another launcher."""
        return self.cluster.run(ROOT / "launch" / script, *arguments, environment={"KEYE_SITE": str(self.site)})

    def num_steps(self) -> int:
        metrics = self.run_dir.metrics
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.num_steps() >= step, f"step {step}")

    def wait_until_done(self) -> None:
        self.wait_until(lambda: self.run_dir.is_done, "DONE")

    def wait_until(self, condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not after {limit_s:.0f} s; the log ends with\n{self.log()[-3000:]}"
            time.sleep(0.05)

    def wait_for_end_of(self, job: str) -> None:
        ended = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait_until(lambda: self.cluster.job(job, "JobState").startswith(ended), f"the end of job {job}")

    def log(self) -> str:
        path = self.run_dir.path / "train.log"
        return path.read_text() if path.exists() else "(no log)"

    def ranks_on(self, node: str) -> list[int]:
        """Process ids."""
        launchers = self.cluster.processes(node, "run_ranks.py")
        return [pid for pid in self.cluster.processes(node, "megatron_keye.train.cli train") if pid not in launchers]

    def attempts(self) -> list[Attempt]:
        return Journal(self.run_dir.path).attempts()

    def endings(self) -> list[Ending]:
        return [attempt.ending for attempt in self.attempts() if attempt.ending is not None]

    def causes(self) -> list[str]:
        return [ending.cause for ending in self.endings()]

    def assert_like(self, other: RunDir) -> None:
        """The same losses and samples, step for step, as a run that nothing happened to."""
        assert losses(self.run_dir.path) == losses(other.path)
        assert self.run_dir.ledger.read_text() == other.ledger.read_text()

    def assert_close_to(self, other: RunDir) -> None:
        """The same samples as a run at another layout, and its losses up to rounding."""
        assert self.run_dir.ledger.read_text() == other.ledger.read_text()
        assert losses(self.run_dir.path) == pytest.approx(losses(other.path), rel=ROUNDING)

    def assert_little_lost(self) -> None:
        """No attempt threw away more than the steps since the save before it."""
        assert all(ending.last_step - ending.saved_step <= SAVE_EVERY for ending in self.endings())


@pytest.fixture
def drill(cluster, settings, tmp_path) -> Iterator[Drill]:
    yield Drill(cluster, settings, RunDir(tmp_path / "run"), write_site(tmp_path))
    cluster.run("scancel", "--me", check=False)


def write_site(folder: Path) -> Path:
    """The site's settings for these clusters."""
    site = folder / "site.env"
    io = "SITE_IO_PARTITION=io\nSITE_IO_CPUS=1\n"
    site.write_text(f"SITE_CPUS_PER_NODE=1\n{io}SITE_PYTHON={sys.executable}\nGLOO_SOCKET_IFNAME=lo\n")
    return site
