"""Which nodes are not fit to train, from what each of them says about itself. Pure.

`launch/preflight_node.py` makes the reports; comparing them finds what no node can see alone: another clock, driver or version.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

MAX_CLOCK_SKEW_S = 5.0
"""Between a node and the median of all; leases of I/O servers need a few seconds."""
MIN_FREE_DISK_BYTES = 10 << 30
MAX_USED_GPU_BYTES = 2 << 30
"""Before training starts: more means that another process holds the GPU."""
MIN_SHARE_OF_BANDWIDTH = 0.5
"""Of the median node's, for file system and network."""


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str
    memory_bytes: int
    used_bytes: int
    ecc_errors: int
    """Uncorrected, since the driver was loaded."""
    slowed_by: str = ""
    """Why its clock is held down, where hardware does that; empty when it is not."""


@dataclass(frozen=True)
class NodeReport:
    """What a node says about itself. `problems` are what it found out alone, such as a GPU that computes wrongly."""

    time_s: float
    gpus: tuple[Gpu, ...]
    versions: dict[str, str]
    free_disk_bytes: int
    disk_bytes_per_s: float
    network_bytes_per_s: float | None = None
    """All-reduce with its better neighbour; None where it was not measured."""
    problems: tuple[str, ...] = field(default=())


def node_report(fields: Mapping) -> NodeReport:
    """From JSON. Raises TypeError or KeyError for anything else."""
    return NodeReport(
        **{**fields, "gpus": tuple(Gpu(**gpu) for gpu in fields["gpus"]), "problems": tuple(fields["problems"])},
    )


def unfit(reports: Mapping[str, NodeReport | None], num_gpus: int) -> dict[str, list[str]]:
    """What is wrong, by node; only nodes that are not fit are in it. A node that said nothing has None as its report."""
    known = {node: report for node, report in reports.items() if report is not None}
    problems = {node: ["it did not report"] for node, report in reports.items() if report is None}
    for node, report in known.items():
        found = [*report.problems, *_own_problems(report, num_gpus), *_other_than_most(report, list(known.values()))]
        if found:
            problems[node] = found
    return problems


def _own_problems(report: NodeReport, num_gpus: int) -> list[str]:
    problems = []
    if report.gpus and len(report.gpus) != num_gpus:
        problems.append(f"{len(report.gpus)} GPUs are visible, expected {num_gpus}")
    for number, gpu in enumerate(report.gpus):
        if gpu.ecc_errors:
            problems.append(f"GPU {number} has {gpu.ecc_errors} uncorrected memory errors")
        if gpu.used_bytes > MAX_USED_GPU_BYTES:
            problems.append(f"{gpu.used_bytes / 2**30:.1f} GiB of GPU {number} are in use already")
        if gpu.slowed_by:
            problems.append(f"the clock of GPU {number} is held down: {gpu.slowed_by}")
    if report.free_disk_bytes < MIN_FREE_DISK_BYTES:
        problems.append(
            f"{report.free_disk_bytes / 2**30:.1f} GiB are free in the run directory, expected {MIN_FREE_DISK_BYTES / 2**30:.0f}"
        )
    return problems


def _other_than_most(report: NodeReport, everybody: Sequence[NodeReport]) -> list[str]:
    """Only where there is a majority: of two nodes that differ nobody can say which one is right, so both are named."""
    problems = []
    skew_s = report.time_s - median(other.time_s for other in everybody)
    if abs(skew_s) > MAX_CLOCK_SKEW_S:
        problems.append(f"its clock is {skew_s:+.1f} s off the others'")
    for what, own, values in (
        ("versions", _versions(report), [_versions(other) for other in everybody]),
        ("GPUs", _gpu_kinds(report), [_gpu_kinds(other) for other in everybody]),
    ):
        usual, count = Counter(values).most_common(1)[0]
        if own != usual or (count < len(values) and 2 * count <= len(values)):
            problems.append(f"its {what} differ from other nodes': {own}")
    for what, rate, rates in (
        ("file system", report.disk_bytes_per_s, [other.disk_bytes_per_s for other in everybody]),
        ("network", report.network_bytes_per_s, [r for other in everybody if (r := other.network_bytes_per_s) is not None]),
    ):
        if rate is not None and len(rates) > 2 and rate < MIN_SHARE_OF_BANDWIDTH * median(rates):
            problems.append(f"its {what} moves {rate / 1e9:.2f} GB/s, the median node's {median(rates) / 1e9:.2f}")
    return problems


def _versions(report: NodeReport) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))


def _gpu_kinds(report: NodeReport) -> str:
    kinds = Counter(f"{gpu.name} with driver {gpu.driver}" for gpu in report.gpus)
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())) or "none"
