# shellcheck shell=bash disable=SC2034  # variables are for those that source this
# What the SLURM launchers share: where things are, the site's settings, and the environment of training processes.

keye_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    echo "$(basename "$0"): error: $*" >&2
    exit 65
}

# Reads launch/site.env (or the file in KEYE_SITE) into exported variables, and loads the modules that it names.
load_site() {
    local file=${KEYE_SITE:-$keye_root/launch/site.env}
    if [[ -f $file ]]; then
        set -a
        # shellcheck source=/dev/null
        . "$file"
        set +a
    elif [[ -n ${KEYE_SITE:-} ]]; then
        die "KEYE_SITE names $file, which is not there; copy launch/site.env.example"
    fi
    if [[ -n ${SITE_MODULES:-} ]]; then
        # shellcheck disable=SC2086  # one word per module
        module load $SITE_MODULES
    fi
}

# Sets KEYE_ROOT, KEYE_PYTHON (the trainer's Python, which the container has or all nodes share) and login_python, which submits.
find_python() {
    export KEYE_ROOT=$keye_root
    export KEYE_PYTHON=${SITE_PYTHON:-$keye_root/.venv/bin/python}
    login_python=${SITE_LOGIN_PYTHON:-$KEYE_PYTHON}
    export PYTHONPATH=$keye_root${PYTHONPATH:+:$PYTHONPATH}
}

# Sets in_container: what runs a command of this node in the site's container, empty where there is none.
container_command() {
    in_container=()
    case ${SITE_CONTAINER:-} in
        "") ;;
        pyxis)
            in_container=(srun --ntasks=1 --overlap --container-image="$SITE_IMAGE" ${SITE_MOUNTS:+--container-mounts="$SITE_MOUNTS"}) ;;
        apptainer)
            in_container=(apptainer exec --nv ${SITE_MOUNTS:+--bind="$SITE_MOUNTS"} "$SITE_IMAGE") ;;
        *) die "SITE_CONTAINER is '$SITE_CONTAINER' in launch/site.env: expected pyxis, apptainer, or nothing" ;;
    esac
}

# Everything that a training process finds in its environment, for $1 processes on this node. What is set already stays.
training_environment() {
    local threads=$(($(nproc) / $1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    # Megatron's tensor parallelism relies on kernels being started in the order in which they were issued.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # A failed collective ends the process; what it was doing is written down by the rank's own watchdog.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # Compiled kernels go to the node's own disk: thousands of ranks must not write one shared folder.
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/keye-$(id -u)/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/keye-$(id -u)/inductor}
    export PYTHONUNBUFFERED=1 PYTHONPATH=$keye_root${PYTHONPATH:+:$PYTHONPATH}
    ulimit -n "$(ulimit -Hn)" 2>/dev/null || true
    ulimit -c 0
}

# Options of sbatch that the site asks of every job.
site_options() {
    local name option
    for name in partition account qos; do
        option=SITE_${name^^}
        [[ -z ${!option:-} ]] || printf '%s\n' "--$name=${!option}"
    done
}

# submit DRY_RUN OPTIONS... SCRIPT ARGUMENTS...: sbatch with the site's options, or what it would be.
submit() {
    local dry_run=$1 options
    shift
    mapfile -t options < <(site_options)
    if ((dry_run)); then
        printf '%q ' sbatch "${options[@]}" "$@"
        echo
    else
        sbatch --parsable "${options[@]}" "$@"
    fi
}
