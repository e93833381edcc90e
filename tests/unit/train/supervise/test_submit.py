"""What launch/train.sh and launch/pretrain_chain.sh make of their arguments, without SLURM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_keye.config.load import load_config
from megatron_keye.errors import SettingsError
from megatron_keye.train.supervise import chain, submit
from megatron_keye.train.supervise.chain import read_chain
from megatron_keye.train.supervise.submit import node_counts, site_from_environment

ROOT = Path(__file__).resolve().parents[4]
CHAIN = """
runs: {runs}
options: --nodes 2 --gpus-per-node 2
stages:
  - {{name: one, settings: debug}}
  - {{name: two, settings: debug, options: --nodes 4 --set train.steps=7}}
"""


@pytest.fixture(autouse=True)
def launcher(monkeypatch):
    """What launch/lib.sh sets."""
    monkeypatch.setenv("KEYE_ROOT", str(ROOT))
    monkeypatch.setenv("KEYE_PYTHON", "/venv/bin/python")


def made(*arguments: str):
    return submit.make_job(submit.parser().parse_args(arguments))[0]


def test_a_job(tmp_path):
    job = made(
        "debug",
        "--nodes",
        "3",
        "--gpus-per-node",
        "4",
        "--run-dir",
        str(tmp_path / "x"),
        "--set",
        "train.hang_timeout_s=90",
        "parallel.tp=2",
    )
    assert job.arguments == (
        "train", "debug", "--run-dir", str(tmp_path / "x"), "--set", "train.hang_timeout_s=90", "parallel.tp=2",
    )  # fmt: skip
    assert (job.hang_s, job.policy.node_counts, job.name) == (90.0, (3,), "keye-x")


def test_a_run_goes_on_from_another(tmp_path):
    job = made("debug", "--run-dir", str(tmp_path / "b"), "--continues", str(tmp_path / "a"))
    assert job.continues == str(tmp_path / "a")
    assert job.arguments[-2:] == ("--set", f"model.init_from={tmp_path / 'a'}")


@pytest.mark.parametrize(
    ("overrides", "nodes", "min_nodes", "gpus", "counts"),
    [
        ((), 4, 4, 8, (4,)),
        ((), 4, 2, 8, (4, 3, 2)),
        (("parallel.tp=2", "parallel.pp=2"), 6, 1, 2, (6, 4, 2)),  # a replica takes two nodes
    ],
)
def test_node_counts_that_the_layout_allows(overrides, nodes, min_nodes, gpus, counts):
    assert node_counts(load_config("debug", overrides), nodes, min_nodes, gpus) == counts


@pytest.mark.parametrize("min_nodes", [0, 5])
def test_a_least_number_of_nodes_that_cannot_be(min_nodes):
    with pytest.raises(SettingsError, match="expected 1 to 4"):
        node_counts(load_config("debug"), 4, min_nodes, 8)


def test_a_site():
    site = site_from_environment(
        {"SITE_PARTITION": "gpu", "SITE_SBATCH_OPTIONS": "--exclusive --mem=0", "SITE_GPU_OPTION": "none", "HOME": "/"}
    )
    assert (site.partition, site.sbatch_options, site.gpu_option, site.account) == ("gpu", ("--exclusive", "--mem=0"), "", "")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SITE_CONTAINER": "docker"}, "expected pyxis, apptainer, or nothing"),
        ({"SITE_CONTAINER": "pyxis"}, "expected SITE_IMAGE"),
        ({"SITE_CPUS_PER_NODE": "many"}, "expected a number > 0"),
        ({"SITE_IO_CPUS": "0"}, "expected a number > 0"),
    ],
)
def test_a_site_that_cannot_be(environment, said):
    with pytest.raises(SettingsError, match=said):
        site_from_environment(environment)


def test_a_layout_that_does_not_fit_is_refused_before_anything_is_submitted(tmp_path, capsys):
    assert submit.main(["debug", "--gpus-per-node", "3", "--run-dir", str(tmp_path / "x"), "--set", "parallel.tp=2"]) == 65
    assert "start a multiple of 2 processes" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_dry_run_shows_everything_and_makes_nothing(tmp_path, capsys):
    assert submit.main(["debug", "--nodes", "2", "--gpus-per-node", "1", "--run-dir", str(tmp_path / "x"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in ("sbatch --parsable", "--signal=B:USR1@300", "srun --job-name=keye-train", "NODE0,NODE1", "exec", '"nodes": 2'):
        assert part in out
    assert not (tmp_path / "x").exists()


def test_a_run_with_io_servers_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SITE_IO_CPUS", "4")
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("sources: [{name: a, path: sets/a}, {name: b, path: /data/b}]")
    run = tmp_path / "x"
    job = made("debug", "--run-dir", str(run), "--io-nodes", "2", "--set", f"data.train={mixture}", "data.valid=s3://bucket/valid")
    assert (job.io_nodes, job.site.io_cpus) == (2, 4)
    assert job.io_roots == tuple(sorted(("/data/b", "s3://bucket/valid", str(tmp_path / "sets/a"))))
    assert job.arguments[-2:] == (f"data.media.registry={run}/io_servers", f"data.media.secret_file={run}/io_servers/secret")


@pytest.mark.parametrize(
    ("setting", "said"), [("data.media.registry=/shared/io", "use one or the other"), ("data.media.decoder=dali", "set it to pyav")]
)
def test_io_servers_that_a_run_cannot_have(tmp_path, setting, said):
    with pytest.raises(SettingsError, match=said):
        made("debug", "--run-dir", str(tmp_path / "x"), "--io-nodes", "1", "--set", setting)


def test_a_dry_run_with_io_servers(tmp_path, capsys):
    assert submit.main(["debug", "--gpus-per-node", "1", "--run-dir", str(tmp_path / "x"), "--io-nodes", "3", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "once on each CPU node\nsrun --het-group=1 --job-name=keye-io --nodes=3" in out
    assert " : --job-name=keye-x --nodes=3 " in out
    assert f"data.media.registry={tmp_path / 'x'}/io_servers" in out
    assert not (tmp_path / "x").exists()


def test_a_chain(tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN.format(runs="/r"))
    first, second = read_chain(path)
    common = ("debug", "--nodes", "2", "--gpus-per-node", "2")
    assert first.arguments == (*common, "--run-dir", "/r/one")
    assert second.arguments == (*common, "--nodes", "4", "--set", "train.steps=7", "--run-dir", "/r/two", "--continues", "/r/one")
    assert made(*second.arguments).nodes == 4


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "runs: x", "runs: x\nstages: []", "runs: x\nstages: [{name: a}]", "runs: x\nstage: []\nstages: [{name: a, settings: b}]",
     "runs: x\nstages: [{name: a, settings: b}, {name: a, settings: b}]", "runs: x\nstages: [{name: a, settings: b, seting: c}]", "a: [b"],
)  # fmt: skip
def test_a_file_that_is_no_chain(tmp_path, text):
    path = tmp_path / "chain.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=str(path)):
        read_chain(path)


def test_a_dry_run_of_a_chain(tmp_path, capsys):
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN.format(runs=tmp_path / "runs"))
    assert chain.main([str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "--dependency=afterok:JOB_OF_one" in out
    assert f"model.init_from={tmp_path / 'runs/one'}" in out
    assert not (tmp_path / "runs").exists()


def test_the_supervisor_needs_no_packages():
    """It runs on the nodes themselves, beside the container that has them."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import megatron_keye.train.supervise.__main__"
    subprocess.run([sys.executable, "-S", "-c", code, ROOT], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("container", "runner", "expected"),
    [
        ("apptainer", "apptainer", "exec --nv --bind=/a:/b /image"),
        ("pyxis", "srun", "--ntasks=1 --overlap --container-image=/image --container-mounts=/a:/b"),
    ],
)
@pytest.mark.parametrize(
    ("script", "arguments", "command"),
    [
        ("eval.sbatch", ("--run-dir", "/x"), "-m megatron_keye.train.cli eval --run-dir /x"),
        ("convert.sbatch", ("inspect", "/x"), f"{ROOT}/data_tools/convert.py inspect /x"),
        ("io_servers.sbatch", (str(ROOT), "/registry"), f"{ROOT}/launch/io_server.sh /registry"),
    ],
)
def test_every_job_runs_in_the_container(tmp_path, container, runner, expected, script, arguments, command):
    (tmp_path / runner).write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / runner).chmod(0o755)
    (tmp_path / "site.env").write_text(f"SITE_CONTAINER={container}\nSITE_IMAGE=/image\nSITE_MOUNTS=/a:/b\n")
    job = {"KEYE_JOB_ROOT": str(ROOT), "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "1"}
    environment = {**os.environ, **job, "KEYE_SITE": str(tmp_path / "site.env"), "PATH": f"{tmp_path}:/bin:/usr/bin"}
    batch = ["bash", ROOT / "launch" / script, *arguments]
    done = subprocess.run(batch, capture_output=True, text=True, timeout=60, env=environment, check=True)
    assert done.stdout.startswith(expected)
    assert done.stdout.rstrip().endswith(command)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train.sh", ("debug",)),
        ("train.sh", ("debug", "--io-nodes", "1")),
        ("preflight.sh", ("debug",)),
        ("io_servers.sh", ("--registry", "/shared/io", "--root", "/shared/data")),
        ("convert.sbatch", ("inspect", "/shared/x")),
        ("eval.sbatch", ("--run-dir", "/shared/x")),
        ("status.sh", None),
        ("pretrain_chain.sh", None),
    ],
)
def test_launchers_teach_and_show_what_they_would_do(script, arguments, tmp_path):
    """Without SLURM on the machine."""
    environment = {**os.environ, "SITE_PYTHON": sys.executable, "PATH": f"{Path(sys.executable).parent}:/bin:/usr/bin"}

    def say(*words: str) -> str:
        done = subprocess.run([ROOT / "launch" / script, *words], capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"usage: launch/{script}" in say("--help")
    if arguments is not None:
        shown = say(*(("--dry-run", *arguments) if script.endswith("sbatch") else (*arguments, "--dry-run")))
        assert "sbatch" in shown or "srun" in shown
    assert list(tmp_path.iterdir()) == []


def test_options_of_servers_are_passed_on():
    environment = {**os.environ, "SITE_PYTHON": sys.executable}
    command = [ROOT / "launch/io_servers.sh", "--registry", "/shared/io", "--root", "s3://b/a", "--root", "/data", "--dry-run"]
    done = subprocess.run([*command, "--", "--disk-cache", "/scratch"], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert "s3://b/a /data --disk-cache /scratch" in done.stdout
