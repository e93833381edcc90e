#!/usr/bin/env bash
# One I/O server on this node, inside the container if there is one: REGISTRY SECRET_FILE WORKERS ROOT... [OPTIONS]. Not for people;
# the array job of launch/io_servers.sh runs it, and the supervisor of a run that has CPU nodes of its own.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
registry=$1 secret=$2 workers=$3
shift 3
# Set for the ranks of the same job, whose GPUs are not on this node.
unset CUDA_VISIBLE_DEVICES
export PYTHONUNBUFFERED=1 PYTHONPATH=$keye_root${PYTHONPATH:+:$PYTHONPATH}
exec "$KEYE_PYTHON" -m megatron_keye.train.cli io-server --listen 0.0.0.0:0 --advertise "$SLURMD_NODENAME" --workers "$workers" \
    --root "$@" --registry "$registry" --secret-file "$secret"
