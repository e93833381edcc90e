#!/usr/bin/env bash
# Checks nodes before a run is submitted to them. `launch/preflight.sh --help` teaches.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
load_site
find_python
exec "$login_python" -m megatron_keye.train.supervise.check_nodes "$@"
