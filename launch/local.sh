#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains or evaluates on all devices of this machine, as one process.
#
#   launch/local.sh [--dry-run] --config=FILE.py[:ARGUMENTS] --workdir=DIR [FLAG ...]
#
# PYTHON names another interpreter than that of .venv.
set -euo pipefail

dry_run=false
if [ "${1-}" = --dry-run ]; then
    dry_run=true
    shift
fi
if [ $# -eq 0 ]; then
    echo "Error: nothing to run; usage: $0 [--dry-run] --config=FILE.py --workdir=DIR [FLAG ...]" >&2
    exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if [ -z "${PYTHON-}" ] && [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
fi
command=("$python" -u -m balpoe_jax.main "$@")

if "$dry_run"; then
    printf 'cd %q\n' "$root"
    printf '%q ' "${command[@]}"
    echo
    exit
fi
cd "$root"
exec "${command[@]}"
