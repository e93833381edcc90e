"""Which nodes are unfit, as a table of reports; and what a node says about itself."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch.preflight_network import pairs
from launch.preflight_node import list_gpus, parse_gpu
from megatron_keye.train.supervise.preflight import Gpu, NodeReport, node_report, unfit

ROOT = Path(__file__).resolve().parents[4]
GPU = Gpu("H200", "570.1", memory_bytes=141 << 30, used_bytes=1 << 29, ecc_errors=0)
GOOD = NodeReport(1000.0, (GPU,) * 8, {"torch": "2.13.0"}, 1 << 40, disk_bytes_per_s=2e9, network_bytes_per_s=40e9)


def gpus_with(**changes) -> tuple[Gpu, ...]:
    return (replace(GPU, **changes), *GOOD.gpus[1:])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": GOOD.gpus[:7]}, "7 GPUs are visible, expected 8"),
        ({"gpus": gpus_with(ecc_errors=2)}, "GPU 0 has 2 uncorrected memory errors"),
        ({"gpus": gpus_with(used_bytes=40 << 30)}, "40.0 GiB of GPU 0 are in use already"),
        ({"gpus": gpus_with(slowed_by="hardware slowdown")}, "the clock of GPU 0 is held down: hardware slowdown"),
        ({"gpus": gpus_with(driver="550.2")}, "its GPUs differ from other nodes': 1 x H200 with driver 550.2, 7 x H200 with driver 570.1"),
        ({"versions": {"torch": "2.12.0"}}, "its versions differ from other nodes': torch 2.12.0"),
        ({"time_s": 1009.0}, "its clock is +9.0 s off the others'"),
        ({"free_disk_bytes": 1 << 30}, "1.0 GiB are free in the run directory, expected 10"),
        ({"disk_bytes_per_s": 0.5e9}, "its file system moves 0.50 GB/s, the median node's 2.00"),
        ({"network_bytes_per_s": 4e9}, "its network moves 4.00 GB/s, the median node's 40.00"),
        ({"problems": ("GPU 3 computes a wrong product",)}, "GPU 3 computes a wrong product"),
    ],
)
def test_one_node_that_is_unfit(changes, said):
    problems = unfit({"n1": GOOD, "n2": replace(GOOD, **changes), "n3": GOOD}, num_gpus=8)
    assert list(problems) == ["n2"]
    assert said in problems["n2"]


def test_nodes_that_are_fit():
    assert unfit({"n1": GOOD, "n2": replace(GOOD, time_s=1002.0, disk_bytes_per_s=1.5e9)}, num_gpus=8) == {}


def test_a_node_that_says_nothing():
    assert unfit({"n1": GOOD, "n2": None}, num_gpus=8) == {"n2": ["it did not report"]}


def test_of_two_that_differ_both_are_named():
    assert set(unfit({"n1": GOOD, "n2": replace(GOOD, versions={"torch": "2.12.0"})}, num_gpus=8)) == {"n1", "n2"}


def test_a_line_of_nvidia_smi():
    assert Gpu(**parse_gpu("NVIDIA H200, 570.124.06, 143771, 4, 0, Not Active")) == Gpu(
        "NVIDIA H200", "570.124.06", 143771 << 20, 4 << 20, 0
    )
    bad = parse_gpu("NVIDIA H200, 570.124.06, 143771, 4, 3, Active")
    assert (bad["ecc_errors"], bad["slowed_by"]) == (3, "hardware slowdown")
    assert parse_gpu("GeForce, 570.1, 8192, 4, [N/A], [N/A]")["ecc_errors"] == 0


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo 'Unable to determine the device handle' >&2; exit 15", "nvidia-smi failed: Unable to determine"), ("exit 0", "")],
)
def test_nvidia_smi_that_fails(tmp_path, monkeypatch, script, said):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    problems = []
    assert list_gpus(problems) == []
    assert said in "".join(problems)


def report_on(run_dir: Path) -> NodeReport:
    command = [sys.executable, ROOT / "launch/preflight_node.py", run_dir]
    return node_report(json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout))


def test_a_real_node(tmp_path):
    report = report_on(tmp_path)
    assert report.problems == ()
    assert report.disk_bytes_per_s > 0
    assert "torch" in report.versions
    assert list(tmp_path.iterdir()) == [], "it cleans up"
    assert node_report(json.loads(json.dumps(asdict(report)))) == report


def test_a_real_node_without_the_run_directory(tmp_path):
    (problem,) = report_on(tmp_path / "nowhere").problems
    assert "the run directory cannot be written" in problem


@pytest.mark.parametrize("num_nodes", range(2, 10))
def test_every_node_is_measured_with_its_neighbours(num_nodes):
    rounds = [pairs(num_nodes, number) for number in (0, 1)]
    for met in rounds:
        nodes = [node for pair in met for node in pair]
        assert len(nodes) == len(set(nodes)), "no node is in two pairs at a time"
        assert len(nodes) >= num_nodes - 1
        assert all((b - a) % num_nodes == 1 for a, b in met)
    assert {node for met in rounds for pair in met for node in pair} == set(range(num_nodes))
