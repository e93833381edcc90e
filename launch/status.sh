#!/usr/bin/env bash
# How runs on SLURM are doing. `launch/status.sh --help` teaches.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
load_site
find_python
exec "$login_python" -m megatron_keye.train.supervise.status "$@"
