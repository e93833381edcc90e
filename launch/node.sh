#!/usr/bin/env bash
# One node's part of a training job, inside the container if there is one: starts its ranks with torchrun. Not for people;
# the supervisor runs it with srun and says in KEYE_* and MASTER_* which attempt this is.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
training_environment "$KEYE_PROCESSES_PER_NODE"

# Rank 0 speaks for the run in the main log; every rank has a log of its own.
tee=()
((SLURM_NODEID == 0)) && tee=(--tee 0:3)
logs=$KEYE_ATTEMPT_DIR/ranks/$SLURMD_NODENAME
mkdir -p "$logs"
# srun drops what a task still had to say when the step is ended; why torchrun itself failed must not get lost so.
exec 2> >(tee -a "$logs/launcher.log" >&2)

exec "$KEYE_PYTHON" "$keye_root/launch/run_ranks.py" --report "$KEYE_ATTEMPT_DIR/nodes/$SLURMD_NODENAME.json" \
    --nnodes "$KEYE_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$KEYE_PROCESSES_PER_NODE" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 --shutdown-timeout "$KEYE_SHUTDOWN_TIMEOUT_S" \
    --log-dir "$logs" --redirects 3 "${tee[@]}" -m megatron_keye.train.cli "$@"
