"""Keeping a SLURM job's training run alive. Standard library only: it runs beside the container that holds everything else.

1. `job`: what a job runs, and within which limits; written once when the job is submitted.
2. `decide`: why an attempt ended, and what to do about it. Pure.
3. `heartbeats`: which rank has stopped making progress. Pure.
4. `evidence`: what an attempt left behind in the run directory.
5. `journal`: one line per attempt, read by `keye report` and by the next decision.
6. `slurm`: the few SLURM commands that are used, as command lines and as calls.
7. `supervisor`: the loop that ties them together; `python -m megatron_keye.train.supervise RUN_DIR` in the batch shell's place.
"""
