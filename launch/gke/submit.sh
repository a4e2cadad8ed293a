#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts a JobSet of one pod a host on GKE, from tpu.yaml or gpu.yaml in this folder.
#
#   launch/gke/submit.sh --name=NAME --image=IMAGE --hosts=N --claim=CLAIM OPTION ... \
#       -- --config=FILE.py --workdir=/runs/DIR [FLAG ...]
#
#   --name=NAME           of the JobSet
#   --image=IMAGE         made from launch/Dockerfile
#   --hosts=N             pods, one a host
#   --claim=CLAIM         a ReadWriteMany volume claim, mounted at /runs in every pod
#   --tpu=TYPE --topology=AxB --chips=N   a TPU slice and the chips of each of its hosts
#   --gpu=TYPE --gpus=N                   or the GPUs of each host
#   --dry-run             prints the manifest
set -euo pipefail

fail() {
    echo "Error: $*" >&2
    exit 2
}

folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dry_run=false
values=()
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry_run=true ;;
        --)
            shift
            break
            ;;
        --name=* | --image=* | --hosts=* | --claim=* | --tpu=* | --topology=* | --chips=* | \
            --gpu=* | --gpus=*) values+=("${1#--}") ;;
        *) fail "unknown option $1; what is for the training itself follows after --" ;;
    esac
    shift
done
[ $# -gt 0 ] || fail "nothing to run; after -- follow --config=FILE.py and --workdir=/runs/DIR"

manifest=$(python3 "$folder/render.py" "$folder" ${values[@]+"${values[@]}"} -- "$@")
if "$dry_run"; then
    printf '%s\n' "$manifest"
else
    printf '%s\n' "$manifest" | kubectl create --filename=-
fi
