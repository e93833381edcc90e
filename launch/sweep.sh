#!/usr/bin/env bash
# Ends what earlier attempts of a run left on this node: processes whose environment names the run directory $1. Not for
# people; the supervisor runs it on every node after an attempt that did not end well.
set -euo pipefail
for environment in /proc/[0-9]*/environ; do
    if tr '\0' '\n' <"$environment" 2>/dev/null | grep -qxF "KEYE_RUN_DIR=$1"; then
        pid=${environment#/proc/}
        kill -KILL "${pid%/environ}" 2>/dev/null || true
    fi
done
