#!/usr/bin/env bash
# Submits I/O servers, which decode images and videos for training runs, as an array job on CPU nodes.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'HELP'
usage: launch/io_servers.sh --registry DIR --root DIR [--root DIR ...] [options] [-- OPTIONS]

Start I/O servers on CPU nodes, one for each 16 cores of a node. Runs find them in the registry, a shared folder in which each
server keeps a lease; a run goes on without servers, more slowly, and uses them again when they are back. A server whose node is
lost, or whose time is over, is put into the queue again.

  --registry DIR      shared folder for the leases
  --root DIR          folder or URL whose files the servers may read (data of the runs); may be given more than once
  --nodes N           how many CPU nodes (default: 1)
  --partition P       CPU partition (default: SITE_IO_PARTITION of launch/site.env)
  --cpus N            cores of a node, and its decoding processes (default: SITE_IO_CPUS, else 16)
  --time T            time limit after which a server starts anew (default: 1-00:00:00)
  --secret-file F     secret that runs must know (default: DIR/secret of the registry, made if it is not there)
  --dry-run           show the job, submit nothing
  -- OPTIONS          further options of keye io-server, such as --disk-cache

examples:
  launch/io_servers.sh --registry /shared/io --root /shared/train --nodes 4
  launch/io_servers.sh --registry /shared/io --root s3://bucket/train -- --disk-cache /scratch/media --disk-cache-gib 200
  launch/train.sh ... --set data.media.registry=/shared/io data.media.secret_file=/shared/io/secret

end them: scancel -n keye-io

Servers for one run alone, in the same job: launch/train.sh --io-nodes N. That heterogeneous job goes back to the queue as a
whole when it loses a server node; servers of this script never disturb a run.
HELP
}

load_site
find_python
registry="" roots=() nodes=1 partition=${SITE_IO_PARTITION:-} cpus=${SITE_IO_CPUS:-16} time=1-00:00:00 secret="" dry_run=0 further=()
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry_run=1; shift; continue ;;
        --) further=("${@:2}"); break ;;
    esac
    [[ $# -ge 2 ]] || die "$1 needs a value; see --help"
    case $1 in
        --registry) registry=$2 ;;
        --root) roots+=("$2") ;;
        --nodes) nodes=$2 ;;
        --partition) partition=$2 ;;
        --cpus) cpus=$2 ;;
        --time) time=$2 ;;
        --secret-file) secret=$2 ;;
        *) die "unknown option $1; see --help" ;;
    esac
    shift 2
done
[[ -n $registry ]] || die "no --registry given: expected a folder that all nodes share"
((${#roots[@]})) || die "no --root given: expected the folder of the data"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes is '$nodes': expected a number > 0"
secret=${secret:-$registry/secret}

if ((!dry_run)); then
    mkdir -p "$registry"
    [[ -e $secret ]] || (umask 077 && head -c 32 /dev/urandom | base64 >"$secret")
fi
export SITE_PARTITION=$partition
submit "$dry_run" --job-name=keye-io --array="1-$nodes" --nodes=1 --ntasks=1 --cpus-per-task="$cpus" --exclusive --requeue \
    --time="$time" --signal=B:USR1@60 --open-mode=append --output="$registry/server-%a.log" \
    "$keye_root/launch/io_servers.sbatch" "$keye_root" "$registry" "$secret" "$cpus" "${roots[@]}" ${further[@]+"${further[@]}"}
