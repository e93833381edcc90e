"""The SLURM commands that a run needs: command lines as pure functions, calls that fail soft where the cluster may be ailing."""

import re
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from megatron_keye.errors import KeyeError
from megatron_keye.train.supervise.decide import Fate
from megatron_keye.train.supervise.job import Job, Site, io_registry, io_secret

CALL_TIMEOUT_S = 60.0
PROBE_TIMEOUT_S = 30.0
PROBES_AT_A_TIME = 64
TRAIN_STEP = "keye-train"
TOO_FEW_NODES = "node configuration is not available"
"""In what sbatch says when no nodes of the cluster can ever make up a job. It says so again, however often it is asked."""
IO_COMPONENT = 1
"""Of a heterogeneous job; its component 0 trains."""


def sbatch_command(job: Job, exclude: Iterable[str] = (), after: str | None = None) -> list[str]:
    """Submits one job. Everything else about it lies in the run directory.

    `--signal=B:` reaches the supervisor alone: torchrun would die of it. `--no-kill` leaves the job to the supervisor when a node is
    lost. Output of all attempts is appended to one file, in a folder that exists before the job starts.

    With nodes for I/O servers it is a heterogeneous job, whose first component the supervisor runs in. SLURM starts, requeues and ends
    both together, also when any node is lost. Not with `--no-kill`: when the second component loses its last node, SLURM 22.05 then
    requeues that component alone, starts the batch script a second time beside the first, drains the node and holds the job.
    """
    launch = Path(job.root) / "launch"
    return [
        "sbatch", "--parsable", f"--job-name={job.name}", f"--nodes={job.nodes + job.spare_nodes}", "--ntasks-per-node=1",
        f"--cpus-per-task={job.site.cpus_per_node}", *_gpus(job), *_given(job.site, "partition", "account", "qos"),
        f"--time={job.time_limit}", f"--signal=B:USR1@{job.lead_s}", "--requeue", *([] if job.io_nodes else ["--no-kill"]),
        "--open-mode=append",
        f"--output={job.run_dir}/train.log", f"--chdir={job.root}", f"--comment={job.run_dir}",
        *_excluding(exclude), *([f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []), *job.site.sbatch_options,
        *_io_component(job), str(launch / "train.sbatch"), job.root, job.run_dir,
    ]  # fmt: skip


def srun_command(job: Job, nodes: Sequence[str]) -> list[str]:
    """Runs launch/node.sh once on each of `nodes`."""
    return [
        *_srun(job, nodes, TRAIN_STEP),
        "--kill-on-bad-exit=1",
        *_inside(job.site),
        "bash",
        f"{job.root}/launch/node.sh",
        *job.arguments,
    ]


def io_command(job: Job) -> list[str]:
    """Runs launch/io_server.sh once on each node of the job's second component. A server that is lost leaves the others alone."""
    registry, secret = io_registry(Path(job.run_dir)), io_secret(Path(job.run_dir))
    return [
        "srun", f"--het-group={IO_COMPONENT}", "--job-name=keye-io", f"--nodes={job.io_nodes}", f"--ntasks={job.io_nodes}",
        "--ntasks-per-node=1", f"--cpus-per-task={job.site.io_cpus}", "--no-kill", "--kill-on-bad-exit=0",
        f"--output={registry}/server-%N.log", "--open-mode=append", *_inside(job.site),
        "bash", f"{job.root}/launch/io_server.sh", str(registry), str(secret), str(job.site.io_cpus), *job.io_roots,
    ]  # fmt: skip


def check_command(job: Job, nodes: Sequence[str], program: str, *arguments: str) -> list[str]:
    """Runs a Python program once on each of `nodes`, with what the ranks will have."""
    return [*_srun(job, nodes, "keye-check"), "--quiet", *_inside(job.site), job.python, program, *arguments]


def probe_command(node: str, root: str, run_dir: str) -> list[str]:
    """Ends what earlier attempts left on `node`; that it does shows that the node answers."""
    return [
        "srun", "--job-name=keye-probe", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--overlap", "--quiet",
        "bash", f"{root}/launch/sweep.sh", run_dir,
    ]  # fmt: skip


def answering(nodes: Sequence[str], root: str, run_dir: str) -> list[str]:
    """Those of `nodes` on which a step can still be run."""
    with ThreadPoolExecutor(PROBES_AT_A_TIME) as pool:
        answers = pool.map(lambda node: _succeeds(probe_command(node, root, run_dir), PROBE_TIMEOUT_S), nodes)
        return [node for node, answer in zip(nodes, answers, strict=True) if answer]


def hostnames(nodelist: str) -> list[str]:
    """`gpu[1-3]` as three names. Raises KeyeError."""
    return _call(["scontrol", "show", "hostnames", nodelist]).split()


def show_job(job: str) -> str:
    """What SLURM knows of a job, as one line; empty where it does not answer."""
    try:
        return _call(["scontrol", "-o", "show", "job", job])
    except KeyeError:
        return ""


def end_time_s(shown: str) -> float:
    """When the job's time is over, in seconds since the epoch; infinity where it has no limit."""
    try:
        return datetime.fromisoformat(_field(shown, "EndTime")).timestamp()
    except ValueError:
        return float("inf")


def fate_of(shown: str, restarts: int, limit_s: float) -> Fate:
    """What becomes of a job that started `restarts` times before and may run until `limit_s`.

    While its processes are being ended SLURM calls a job COMPLETING, whether it was cancelled, requeued or ran out of time.
    """
    state = _field(shown, "JobState")
    if int(_field(shown, "Restarts") or restarts) > restarts or state in ("PENDING", "REQUEUED"):
        return "requeued"
    if state == "TIMEOUT" or (state == "COMPLETING" and end_time_s(shown) >= limit_s):
        return "timed_out"
    return "cancelled" if state in ("CANCELLED", "COMPLETING") else "running"


def end_step(job: str, name: str) -> None:
    """SIGKILL to all steps of that name."""
    for line in _call(["squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i %j"]).splitlines():
        step, _, step_name = line.strip().partition(" ")
        if step_name == name:
            _succeeds(["scancel", "--signal=KILL", step], CALL_TIMEOUT_S)


def requeue(job: str) -> None:
    """Raises KeyeError where SLURM refuses."""
    _call(["scontrol", "requeue", job])


def submit(job: Job, exclude: Iterable[str] = (), after: str | None = None) -> str:
    """The new job's id. Raises KeyeError where SLURM refuses."""
    return _call(sbatch_command(job, exclude, after)).strip().split(";")[0]


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs; `text` is its state and, while it waits, for what."""

    id: str
    text: str


def my_jobs() -> dict[str, QueuedJob]:
    """The training jobs of this user by run directory, which their comment names."""
    jobs = {}
    for line in _call(["squeue", "--noheader", "--me", "--format=%i|%T|%r|%k"]).splitlines():
        job_id, state, reason, run_dir = line.split("|", 3)
        jobs[run_dir.strip()] = QueuedJob(leader(job_id), state.lower() if reason == "None" else f"{state.lower()}: {reason}")
    return {run_dir: job for run_dir, job in jobs.items() if run_dir.startswith("/")}


def leader(job_id: str) -> str:
    """The job that stands for a component of a heterogeneous one: `7` of `7+1`. Any other is itself."""
    return job_id.partition("+")[0]


def redirect_dependents(old: str, new: str) -> None:
    """Jobs that wait for the success of `old` wait for `new` instead."""
    for line in _call(["squeue", "--noheader", "--me", "--states=PENDING", "--format=%i %E"]).splitlines():
        waiting, _, dependency = line.strip().partition(" ")
        if re.search(rf"afterok:{old}\b", dependency):
            _call(["scontrol", "update", f"JobId={leader(waiting)}", f"Dependency=afterok:{new}"])


def _call(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KeyeError(f"`{' '.join(command)}` could not be run: {error}") from error
    if done.returncode:
        raise KeyeError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _field(shown: str, name: str) -> str:
    found = re.search(rf"(?:^|\s){name}=(\S*)", shown)
    return found.group(1) if found else ""


def _succeeds(command: Sequence[str], timeout_s: float) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=timeout_s, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _gpus(job: Job) -> list[str]:
    option = job.site.gpu_option
    return [f"--{option}={'gpu:' if option == 'gres' else ''}{job.gpus_per_node}"] if option else []


def _io_component(job: Job) -> list[str]:
    if not job.io_nodes:
        return []
    return [
        ":", f"--job-name={job.name}", f"--nodes={job.io_nodes}", "--ntasks-per-node=1", f"--cpus-per-task={job.site.io_cpus}",
        "--exclusive", *_given(replace(job.site, partition=job.site.io_partition), "partition", "account", "qos"),
        f"--time={job.time_limit}", "--requeue",
    ]  # fmt: skip


def _given(site: Site, *names: str) -> list[str]:
    values = {"partition": site.partition, "account": site.account, "qos": site.qos}
    return [f"--{name}={values[name]}" for name in names if values[name]]


def _excluding(nodes: Iterable[str]) -> list[str]:
    names = ",".join(sorted(nodes))
    return [f"--exclude={names}"] if names else []


def _srun(job: Job, nodes: Sequence[str], name: str) -> list[str]:
    """One task on each node. `--overlap`: a step that a lost node keeps from ending still holds the resources of the others."""
    return [
        "srun", f"--job-name={name}", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1",
        f"--nodelist={','.join(nodes)}", f"--cpus-per-task={job.site.cpus_per_node}", *_gpus(job), "--overlap", *job.site.srun_options,
    ]  # fmt: skip


def _inside(site: Site) -> list[str]:
    """What puts a task into the site's container: options of srun, or a command before the task's own."""
    match site.container:
        case "pyxis":
            return [f"--container-image={site.image}", *([f"--container-mounts={site.mounts}"] if site.mounts else [])]
        case "apptainer":
            return ["apptainer", "exec", "--nv", *([f"--bind={site.mounts}"] if site.mounts else []), site.image]
    return []
