#!/usr/bin/env bash
# Two ranks, every promise once: equal layouts, training, resume after SIGKILL, scoring. Two GPUs, or two CPU processes.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: launch/smoke_2gpu.sh [WORK_DIR]

In at most 10 minutes, on two GPUs or two CPU processes (gloo) where there are fewer:
  1. the two-rank layouts give the same loss, gradients and weights as one process
  2. a short training run ends with a checkpoint
  3. the same run, killed with SIGKILL and started again, has the same loss curve
  4. the trained checkpoint scores held-out samples

WORK_DIR (default runs/smoke) is emptied first; its logs stay. The demo data must exist: `make data`, or `make smoke`.
exit codes: 0 all passed; otherwise that of the first step that failed.
HELP
}

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

die() {
    echo "launch/smoke_2gpu.sh: error: $*" >&2
    exit 1
}

case ${1:-} in -h | --help) usage; exit 0 ;; esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=${1:-runs/smoke}
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || die "no Python at $python: run \`make setup\`, or set PYTHON"
[[ -f data/demo/valid.jsonl ]] || die "no demo data in data/demo: run \`make data\`"
rm -rf "$work"
mkdir -p "$work"

steps=12
settings=(--set "train.steps=$steps" train.save_every_steps=4 train.valid_every_steps=0 optimizer.warmup_steps=2)

keye() { "$python" -m megatron_keye.train.cli "$@"; }

train() { launch/local.sh -n 2 debug --run-dir "$1" "${settings[@]}"; }

lines_in() { if [[ -f $1 ]]; then wc -l <"$1"; else echo 0; fi; }

# Starts the run in the background and kills launcher and ranks at once when the step after the first checkpoint is done.
train_and_kill() {
    local run_dir=$1 log=$2 launcher ranks
    train "$run_dir" >"$log" 2>&1 &
    launcher=$!
    until (($(lines_in "$run_dir/metrics.jsonl") >= 5)); do
        kill -0 "$launcher" 2>/dev/null || die "the run ended before it could be killed; see $log"
        sleep 0.1
    done
    ranks=$(descendants "$launcher")
    # shellcheck disable=SC2086  # one word per process id
    kill -KILL "$launcher" $ranks
    wait "$launcher" 2>/dev/null || true
    (($(lines_in "$run_dir/metrics.jsonl") < steps)) || die "the run was complete when it was killed; raise steps in this script"
}

descendants() {
    local child
    for child in $(pgrep -P "$1"); do
        echo "$child"
        descendants "$child"
    done
}

same_curve() {
    "$python" - "$1/metrics.jsonl" "$2/metrics.jsonl" "$steps" <<'CODE'
import json
import sys
from pathlib import Path

import torch

first, second = ({m["step"]: m["loss"] for m in map(json.loads, Path(file).read_text().splitlines())} for file in sys.argv[1:3])
# GPU kernels may add in another order after a restart; on CPU nothing may differ.
tolerance = 1e-4 if torch.cuda.device_count() >= 2 else 0.0
if len(first) != int(sys.argv[3]) or first.keys() != second.keys():
    sys.exit(f"expected {sys.argv[3]} steps in both runs, found {sorted(first)} and {sorted(second)}")
worst = max(abs(first[step] - second[step]) / abs(first[step]) for step in first)
print(f"largest relative difference of the loss over {len(first)} steps: {worst:.3g} (tolerance {tolerance:g})")
sys.exit(worst > tolerance)
CODE
}

say "1. layouts"
keye verify-layout debug --layouts tp2 tp2sp cp2 pp2 pp2vp2 dp2 --dtype float64

say "2. training"
train "$work/straight"

say "3. killed and started again"
train_and_kill "$work/killed" "$work/killed.log"
train "$work/killed"
same_curve "$work/straight" "$work/killed"

say "4. scoring"
# Media paths are relative to the input file, so the sample list has to lie beside the demo's own.
samples=data/demo/smoke.jsonl
trap 'rm -f "$samples"' EXIT
head -n 8 data/demo/valid.jsonl >"$samples"
keye score --model "$work/straight" --input "$samples" --output "$work/scores.jsonl"
(($(lines_in "$work/scores.jsonl") == 8)) || die "expected 8 lines in $work/scores.jsonl, found $(lines_in "$work/scores.jsonl")"

say "all passed"
