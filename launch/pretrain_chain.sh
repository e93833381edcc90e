#!/usr/bin/env bash
# Submits training stages to SLURM as jobs that wait for each other. `launch/pretrain_chain.sh --help` teaches.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
load_site
find_python
exec "$login_python" -m megatron_keye.train.supervise.chain "$@"
