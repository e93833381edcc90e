#!/usr/bin/env bash
# Trains on this machine: starts N processes with torchrun and ends with the trainer's own exit code.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: launch/local.sh -n N SETTINGS [arguments of `keye train`]

Train on this machine with N processes: NCCL where there are at least N GPUs, gloo on CPU otherwise.
SETTINGS is a recipe name (`keye config` lists them) or a YAML file. The same command again goes on where the run was.

examples:
  launch/local.sh -n 2 debug --run-dir runs/debug
  launch/local.sh -n 2 debug --run-dir runs/tp2 --set parallel.tp=2 train.steps=100
  launch/local.sh -n 8 keye_vl_1_5_8b --run-dir runs/8b --set data.train=/data/train data.tokenizer=/data/tokenizer
  launch/local.sh -n 2 debug --dry-run     # settings, sizes, first plan, command and environment; starts nothing
  touch runs/debug/STOP        # ends the run at the next step, with a checkpoint

exit codes: 0 done, or stopped on request; 65 change settings or data first; 66 the numbers went wrong;
128 + n ended by signal n; anything else may be tried again.

environment: PYTHON (default .venv/bin/python, else python3), OMP_NUM_THREADS (default cores / N, at least 1)
HELP
}

die() {
    echo "launch/local.sh: error: $*" >&2
    exit 65
}

processes=""
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        -n) [[ $# -ge 2 ]] || die "-n needs a number of processes, for example -n 2"
            processes=$2; shift 2 ;;
        *) break ;;
    esac
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "found -n '${processes}', expected a number of processes > 0, for example: launch/local.sh -n 2 debug"
[[ $# -ge 1 ]] || die "no settings given; expected a recipe name or a YAML file, for example: launch/local.sh -n $processes debug"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3) || die "no Python found: run \`make setup\`, or set PYTHON"

cores=$(nproc)
threads=$((cores / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# Everything runs on this machine: the loopback address works where the host name does not resolve.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
# Megatron's tensor parallelism relies on kernels being started in the order in which they were issued.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

command=("$python" "$root/launch/run_ranks.py" --standalone --local-addr 127.0.0.1 --nproc-per-node "$processes"
    -m megatron_keye.train.cli train)
dry_run=0
for word in "$@"; do
    if [[ $word == --dry-run ]]; then dry_run=1; else command+=("$word"); fi
done
if ((dry_run)); then
    "$python" -m megatron_keye.train.cli train "$@" --processes "$processes"
    printf '\nwould run, with this environment:\n'
    printf '%q ' "${command[@]}"
    printf '\n%s=%s' OMP_NUM_THREADS "$OMP_NUM_THREADS" PYTHONPATH "$PYTHONPATH" GLOO_SOCKET_IFNAME "$GLOO_SOCKET_IFNAME" \
        CUDA_DEVICE_MAX_CONNECTIONS "$CUDA_DEVICE_MAX_CONNECTIONS"
    exit 0
fi

# What is wrong with the settings is said once, before any process is started. Waits for ranks of a launcher that was killed.
"$python" -m megatron_keye.train.cli train "$@" --check --processes "$processes"

exec "${command[@]}"
