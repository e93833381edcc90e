"""The checks of a job's nodes before its first attempt: runs them, and says which nodes are lost or unfit."""

import json
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_keye.train.supervise import slurm
from megatron_keye.train.supervise.job import Job
from megatron_keye.train.supervise.preflight import NodeReport, node_report, unfit

NODE_TIMEOUT_S = 180.0
NETWORK_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Findings:
    lost_nodes: tuple[str, ...]
    problems: dict[str, list[str]]
    """By unfit node."""
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "; ".join(f"{node}: {', '.join(found)}" for node, found in self.problems.items())


def check_nodes(job: Job, nodes: Sequence[str], port: int) -> Findings:
    """Each node alone, all at a time; then, for `full`, the network between those that reported."""
    with ThreadPoolExecutor(slurm.PROBES_AT_A_TIME) as pool:
        answers = dict(zip(nodes, pool.map(lambda node: _report_of(job, node), nodes), strict=True))
    silent = [node for node, report in answers.items() if report is None]
    answering = slurm.answering(silent, job.root, job.run_dir) if silent else []
    reports = {node: report for node, report in answers.items() if report is not None or node in answering}
    notes: tuple[str, ...] = ()
    fit = [node for node, report in reports.items() if report is not None]
    if job.preflight == "full" and len(fit) > 1:
        rates, said = _network(job, fit, port)
        notes = () if rates else (f"the network could not be measured: {said}",)
        reports |= {node: replace(reports[node], network_bytes_per_s=rate) for node, rate in rates.items() if node in fit}
    lost = tuple(node for node in silent if node not in answering)
    return Findings(lost, unfit(reports, job.gpus_per_node), notes)


def _report_of(job: Job, node: str) -> NodeReport | None:
    program = Path(job.root) / "launch/preflight_node.py"
    lines, _ = _output(slurm.check_command(job, [node], str(program), job.run_dir), NODE_TIMEOUT_S)
    try:
        return node_report(json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError, KeyError):
        return None


def _network(job: Job, nodes: Sequence[str], port: int) -> tuple[dict[str, float], str]:
    """Bytes/s by node, and what was said where it could not be measured."""
    program = Path(job.root) / "launch/preflight_network.py"
    lines, errors = _output(slurm.check_command(job, nodes, str(program), "--head", f"{nodes[0]}:{port}"), NETWORK_TIMEOUT_S)
    rates = {}
    for line in lines:
        if line.startswith("{"):
            measured = json.loads(line)
            rates[measured["node"]] = measured["bytes_per_s"]
    return (rates, "") if set(rates) == set(nodes) else ({}, " ".join(errors[-3:]))


def _output(command: Sequence[str], timeout_s: float) -> tuple[list[str], list[str]]:
    """Lines of standard output and error; none of a command that does not end in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return [], [f"no answer within {timeout_s:.0f} s"]
    return done.stdout.splitlines(), done.stderr.splitlines()
