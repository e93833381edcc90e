"""Command lines, and what SLURM's answers are taken for. The cluster in tests/slurm shows that SLURM agrees."""

from dataclasses import replace

import pytest

from megatron_keye.errors import SettingsError
from megatron_keye.train.supervise.decide import Policy
from megatron_keye.train.supervise.job import FILE, Job, Site, load_job
from megatron_keye.train.supervise.slurm import end_time_s, fate_of, io_command, leader, sbatch_command, srun_command

JOB = Job(
    name="keye-8b", root="/shared/keye", run_dir="/shared/runs/8b", python="/venv/bin/python",
    arguments=("train", "debug", "--set", "train.steps=3"),
    nodes=2, spare_nodes=1, gpus_per_node=8, time_limit="1:00:00", lead_s=300, preflight="basic", hang_s=60.0, slow_phase_s=1800.0,
    policy=Policy(node_counts=(2, 1)), io_nodes=0, io_roots=(), continues="",
    site=Site(partition="gpu", account="lab", cpus_per_node=64, sbatch_options=("--exclusive",)),
)  # fmt: skip


def test_sbatch():
    assert sbatch_command(JOB) == [
        "sbatch", "--parsable", "--job-name=keye-8b", "--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=64", "--gpus-per-node=8",
        "--partition=gpu", "--account=lab", "--time=1:00:00", "--signal=B:USR1@300", "--requeue", "--no-kill", "--open-mode=append",
        "--output=/shared/runs/8b/train.log", "--chdir=/shared/keye", "--comment=/shared/runs/8b", "--exclusive",
        "/shared/keye/launch/train.sbatch", "/shared/keye", "/shared/runs/8b",
    ]  # fmt: skip


def test_sbatch_of_a_later_job():
    command = sbatch_command(JOB, exclude=["n7", "n2"], after="41")
    assert {"--exclude=n2,n7", "--dependency=afterok:41", "--kill-on-invalid-dep=yes"} < set(command)


WITH_SERVERS = replace(
    JOB, io_nodes=4, io_roots=("/data/a", "/data/b"), site=Site(partition="gpu", account="lab", io_partition="cpu", io_cpus=32)
)


def test_sbatch_with_io_servers():
    """Two components, one script: what asks for GPUs, signals and waiting stands in the first one alone."""
    command = sbatch_command(WITH_SERVERS, exclude=["n7"], after="41")
    first, second = command[: command.index(":")], command[command.index(":") + 1 :]
    assert {"--gpus-per-node=8", "--signal=B:USR1@300", "--comment=/shared/runs/8b", "--exclude=n7", "--partition=gpu"} < set(first)
    assert "--no-kill" not in command
    assert second == [
        "--job-name=keye-8b", "--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=32", "--exclusive", "--partition=cpu", "--account=lab",
        "--time=1:00:00", "--requeue", "/shared/keye/launch/train.sbatch", "/shared/keye", "/shared/runs/8b",
    ]  # fmt: skip


def test_srun_of_io_servers():
    assert io_command(WITH_SERVERS) == [
        "srun", "--het-group=1", "--job-name=keye-io", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--cpus-per-task=32", "--no-kill",
        "--kill-on-bad-exit=0", "--output=/shared/runs/8b/io_servers/server-%N.log", "--open-mode=append",
        "bash", "/shared/keye/launch/io_server.sh", "/shared/runs/8b/io_servers", "/shared/runs/8b/io_servers/secret", "32",
        "/data/a", "/data/b",
    ]  # fmt: skip


@pytest.mark.parametrize(("job", "expected"), [("7", "7"), ("7+0", "7"), ("7+1", "7")])
def test_a_component_belongs_to_a_job(job, expected):
    assert leader(job) == expected


def test_srun():
    assert srun_command(JOB, ["n1", "n3"]) == [
        "srun", "--job-name=keye-train", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n3", "--cpus-per-task=64",
        "--gpus-per-node=8", "--overlap", "--kill-on-bad-exit=1",
        "bash", "/shared/keye/launch/node.sh", "train", "debug", "--set", "train.steps=3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        (Site(container="pyxis", image="/i.sqsh", mounts="/a:/b"), ["--container-image=/i.sqsh", "--container-mounts=/a:/b", "bash"]),
        (Site(container="pyxis", image="/i.sqsh"), ["--container-image=/i.sqsh", "bash"]),
        (Site(container="apptainer", image="/i.sif", mounts="/a:/b"), ["apptainer", "exec", "--nv", "--bind=/a:/b", "/i.sif", "bash"]),
        (Site(gpu_option="gres"), ["--gres=gpu:8", "--overlap", "bash"]),
        (Site(gpu_option="", srun_options=("--mpi=none",)), ["--mpi=none", "bash"]),
    ],
)
def test_containers_and_options_of_a_site(site, expected):
    command = srun_command(replace(JOB, site=site), ["n1"])
    command.remove("--kill-on-bad-exit=1")
    assert command[command.index("bash") - len(expected) + 1 : command.index("bash") + 1] == expected
    assert any(word.startswith(("--gpus", "--gres")) for word in command) == bool(site.gpu_option)


def test_torchrun_waits_for_a_save_as_long_as_the_time_limit_allows():
    assert JOB.shutdown_timeout_s == 270
    assert replace(JOB, lead_s=10).shutdown_timeout_s == 30


LIMIT_S = end_time_s("EndTime=2026-01-01T10:00:00")


@pytest.mark.parametrize(
    ("shown", "fate"),
    [
        ("JobState=RUNNING Reason=None Restarts=1 EndTime=2026-01-01T10:00:00", "running"),
        ("JobState=COMPLETING Restarts=1 EndTime=2026-01-01T09:00:00", "cancelled"),
        ("JobState=CANCELLED Restarts=1 EndTime=2026-01-01T09:00:00", "cancelled"),
        ("JobState=COMPLETING Restarts=2 EndTime=2026-01-01T11:00:00", "requeued"),
        ("JobState=PENDING Restarts=1 EndTime=Unknown", "requeued"),
        ("JobState=COMPLETING Restarts=1 EndTime=2026-01-01T10:00:20", "timed_out"),
        ("JobState=TIMEOUT Restarts=1 EndTime=2026-01-01T10:00:20", "timed_out"),
        ("", "running"),  # slurmctld does not answer
    ],
)
def test_fate(shown, fate):
    assert fate_of(shown, restarts=1, limit_s=LIMIT_S) == fate


def test_a_job_without_limit_never_ends():
    assert end_time_s("JobState=RUNNING EndTime=Unknown") == float("inf")


def test_a_job_is_read_as_it_was_written(tmp_path):
    job = replace(JOB, run_dir=str(tmp_path))
    job.save()
    assert load_job(tmp_path) == job


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"name": "x"}'])
def test_a_folder_without_a_job(tmp_path, text):
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(SettingsError, match=r"submit the run with launch/train.sh"):
        load_job(tmp_path)


def test_a_job_of_another_version(tmp_path):
    replace(JOB, run_dir=str(tmp_path)).save()
    file = tmp_path / FILE
    file.write_text(file.read_text().replace('"lead_s"', '"lead_seconds"'))
    with pytest.raises(SettingsError, match=r"other fields: \['lead_s', 'lead_seconds'\]"):
        load_job(tmp_path)
