#!/usr/bin/env bash
# Submits a training run to SLURM, or goes on with it. `launch/train.sh --help` teaches.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
load_site
find_python
exec "$login_python" -m megatron_keye.train.supervise.submit "$@"
