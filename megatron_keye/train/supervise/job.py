"""What a SLURM job runs, and within which limits: written to the run directory when the job is submitted, read by every attempt."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_keye.errors import SettingsError
from megatron_keye.train.run_dir import write_atomically
from megatron_keye.train.supervise.decide import Policy

FILE = "job.json"


@dataclass(frozen=True)
class Site:
    """What differs between clusters: `launch/site.env`."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    cpus_per_node: int = 8
    """For the ranks and loader threads of one node."""
    gpu_option: str = "gpus-per-node"
    """The option of sbatch and srun that asks for GPUs; empty where nodes are given out whole without being asked."""
    container: str = ""
    """pyxis, apptainer, or empty."""
    image: str = ""
    mounts: str = ""
    """HOST_PATH:CONTAINER_PATH,... for the container."""
    io_partition: str = ""
    """CPU nodes for I/O servers."""
    io_cpus: int = 16
    """Of one I/O server."""
    sbatch_options: tuple[str, ...] = ()
    srun_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One training run on SLURM."""

    name: str
    root: str
    """The repository, at a path that all nodes share."""
    run_dir: str
    python: str
    """Runs the trainer: on the nodes, or inside the container."""
    arguments: tuple[str, ...]
    """Of `keye train`, with --run-dir."""
    nodes: int
    spare_nodes: int
    gpus_per_node: int
    time_limit: str
    lead_s: int
    """Seconds before the time limit at which the run is asked to stop."""
    preflight: str
    """off, basic (each node alone) or full (and the network between them)."""
    hang_s: float
    slow_phase_s: float
    """Of the run's own settings."""
    policy: Policy
    io_nodes: int
    """CPU nodes for I/O servers of its own, as a second component of the job; 0 for a job without."""
    io_roots: tuple[str, ...]
    """Folders and URLs that those servers may read."""
    continues: str
    """The run whose last checkpoint this one starts from, which must be complete by then; empty for none."""
    site: Site

    @property
    def shutdown_timeout_s(self) -> int:
        """How long torchrun lets ranks finish that were told to end: a save takes longer than its own 30 s."""
        return max(self.lead_s - 30, 30)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def save(self) -> None:
        write_atomically(Path(self.run_dir) / FILE, self.to_json())


def io_registry(run_dir: Path) -> Path:
    """Where the I/O servers of a run's own job keep their leases."""
    return run_dir / "io_servers"


def io_secret(run_dir: Path) -> Path:
    """What those servers and the run alone know."""
    return io_registry(run_dir) / "secret"


def load_job(run_dir: Path) -> Job:
    """Raises SettingsError where the run directory holds no job of this version."""
    path = run_dir / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        policy, site = _made(Policy, content.pop("policy")), _made(Site, content.pop("site"))
        return _made(Job, {**content, "policy": policy, "site": site})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingsError(f"{path} does not describe a job ({error}); submit the run with launch/train.sh") from error


def _made(kind: type, values: dict):
    """A dataclass from JSON: lists become tuples, and the names must be exactly those of its fields."""
    names = {field.name for field in fields(kind)}
    if set(values) != names:
        raise ValueError(f"{kind.__name__} has other fields: {sorted(names ^ set(values))}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
