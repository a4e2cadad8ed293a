#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs one process on each host of a Cloud TPU, through gcloud.
#
#   launch/tpu_pod.sh --name=TPU --zone=ZONE [OPTION ...] -- --config=FILE.py --workdir=DIR [FLAG ...]
#
#   --project=PROJECT   of the TPU; gcloud's own by default
#   --directory=DIR     of this code on the hosts, from the home folder; balpoe_jax by default
#   --install           sets up .venv there first, with JAX for TPUs
#   --dry-run           prints what would be done
#
# The workdir must be on storage that all hosts share.
set -euo pipefail

fail() {
    echo "Error: $*" >&2
    exit 2
}

name='' zone='' project='' directory=balpoe_jax install=false dry_run=false
while [ $# -gt 0 ]; do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --directory=*) directory=${1#*=} ;;
        --install) install=true ;;
        --dry-run) dry_run=true ;;
        --)
            shift
            break
            ;;
        *) fail "unknown option $1; what is for the training itself follows after --" ;;
    esac
    shift
done
[ -n "$name" ] || fail "which TPU? --name=TPU"
[ -n "$zone" ] || fail "the TPU is in which zone? --zone=ZONE"
[ $# -gt 0 ] || fail "nothing to run; after -- follow --config=FILE.py and --workdir=DIR"

run() {
    if "$dry_run"; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# Runs a command on all hosts. Their shell reads it once more, so each word is quoted for it.
on_all_hosts() {
    local remote
    remote=$(printf '%q ' "$@")
    run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" ${project:+--project="$project"} \
        --worker=all --command="cd $(printf '%q' "$directory") && ${remote% }"
}

if "$install"; then
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    jax=$(sed -n 's/^jax==//p' "$root/requirements.txt")
    on_all_hosts sh launch/setup.sh python3 .venv requirements.lock
    on_all_hosts .venv/bin/python -m pip install --quiet "jax[tpu]==$jax"
fi
on_all_hosts .venv/bin/python -u -m balpoe_jax.main --distributed "$@"
