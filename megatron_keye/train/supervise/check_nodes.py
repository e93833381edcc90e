"""launch/preflight.sh: the checks that a training job makes before its first attempt, made by hand."""

import os
import sys
from collections.abc import Sequence

from megatron_keye.errors import KeyeError
from megatron_keye.train.supervise import slurm
from megatron_keye.train.supervise.attempt import free_port
from megatron_keye.train.supervise.checks import check_nodes
from megatron_keye.train.supervise.submit import make_job, parser

HELP = """Check the nodes of an allocation as a training job does before its first attempt: GPUs (visible, healthy, free, computing
right), driver, clock, versions, the run directory written and read back; with --preflight full also the network between neighbours.
Takes the arguments of launch/train.sh, so that exactly what the run needs is checked. Ends with 1 where a node is not fit."""
EXAMPLES = """\
examples:
  salloc --nodes 8 --gpus-per-node 8 launch/preflight.sh keye_vl_1_5_8b --run-dir /shared/runs/8b --preflight full
  launch/preflight.sh keye_vl_1_5_8b --run-dir /shared/runs/8b --dry-run       # the commands that it would run"""


def main(argv: Sequence[str]) -> int:
    arguments = parser()
    arguments.prog, arguments.description, arguments.epilog = "launch/preflight.sh", HELP, EXAMPLES
    args = arguments.parse_args(argv)
    try:
        job, _ = make_job(args)
        if args.dry_run:
            print(" ".join(slurm.check_command(job, ["NODE"], f"{job.root}/launch/preflight_node.py", job.run_dir)))
            return 0
        if "SLURM_JOB_NODELIST" not in os.environ:
            raise KeyeError("no nodes are allocated here; run it under salloc or in a job, as --help shows")
        os.makedirs(job.run_dir, exist_ok=True)
        nodes = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
        findings = check_nodes(job, nodes, free_port(int(os.environ["SLURM_JOB_ID"])))
    except KeyeError as error:
        print(f"launch/preflight.sh: error: {error}", file=sys.stderr)
        return error.exit_code
    for note in findings.notes:
        print(note)
    for node in nodes:
        problems = ["it does not answer"] if node in findings.lost_nodes else findings.problems.get(node, [])
        print(f"{node}: {'; '.join(problems) or 'fit'}")
    return int(bool(findings.problems or findings.lost_nodes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
