"""A run whose I/O server is lost with its node, and comes back."""

import json
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Drill

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster"), io_nodes=1) as cluster:
        yield cluster


def lease_ends_s(registry: Path) -> float:
    """When the newest lease of a server runs out; 0 without one."""
    return max((json.loads(file.read_text())["expires_s"] for file in registry.glob("*.json")), default=0.0)


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
