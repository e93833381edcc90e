"""Keeping a SLURM job's training run alive.

What runs inside a job needs the standard library only, since it runs beside the container that holds everything else:

1. `job`: what a job runs, and within which limits; written once when the job is submitted.
2. `decide`: why an attempt ended, and what to do about it. Pure.
3. `heartbeats`: which rank has stopped making progress. Pure.
4. `preflight`, `checks`: which nodes are not fit to train. The first is pure.
5. `evidence`: what an attempt left behind in the run directory.
6. `journal`: one line per event, read by the next decision and by `goodput` for `keye report`; `diagnosis`: `failure.json`.
7. `slurm`: the few SLURM commands that are used, as command lines and as calls.
8. `servers`: I/O servers in the job itself, where it has nodes for them.
9. `attempt`, `supervisor`: one start of the ranks, and one after the other; `python -m megatron_keye.train.supervise RUN_DIR`.

What people run on the login host is behind launch/*.sh: `submit`, `chain`, `status`, `check_nodes`.
"""
