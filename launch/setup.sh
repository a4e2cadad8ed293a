#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes a virtual environment with what a requirements file names: setup.sh PYTHON VENV FILE
# Of a FILE that ends in .lock, the hash of every package is verified; of one that ends in
# -newest.txt, all are the newest that this Python can have.
set -eu

python=$1
venv=$2
requirements=$3
set -- # from here on the options of pip

fail() {
    echo "Error: $*" >&2
    exit 2
}

oldest=11
versions='3.11, 3.12 or 3.13'
suffix='' # of the variables of make
case $requirements in
    *-newest.txt)
        oldest=12 # of the newest JAX
        versions='3.12 or 3.13'
        suffix=_NEWEST
        set -- --upgrade --upgrade-strategy=eager
        ;;
esac

[ -n "$venv" ] || fail "the virtual environment needs a folder: make VENV$suffix=DIR"

supported="import sys; sys.exit(not (3, $oldest) <= sys.version_info[:2] <= (3, 13))"
if ! command -v "$python" > /dev/null 2>&1; then
    fail "there is no ${python:-such Python} here; install Python $versions, or name one:" \
        "make PYTHON$suffix=..."
fi
if ! "$python" -c "$supported"; then
    found=$("$python" -c 'import platform; print(platform.python_version())' 2> /dev/null || echo '?')
    # The default may be old while a newer one is installed beside it.
    for other in python3.13 python3.12 python3.11; do
        if command -v "$other" > /dev/null 2>&1 && "$other" -c "$supported" 2> /dev/null; then
            echo "$python is version $found; using $other instead."
            python=$other
            break
        fi
    done
    "$python" -c "$supported" || fail "Python $versions is needed, and $python is version" \
        "$found; install one and name it: make PYTHON$suffix=python3.12"
fi

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c "$supported" 2> /dev/null; then
    # Only ever clears what is an environment, of a Python that is gone or too old.
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
        fail "$venv is there and is no virtual environment; name another folder: make VENV$suffix=DIR"
    fi
    "$python" -m venv --clear "$venv" 2> /dev/null || {
        fail "$python cannot make a virtual environment; install its venv module (on Debian and" \
            "Ubuntu: apt-get install python3-venv)."
    }
fi

remedy=''
case $requirements in
    *.lock)
        set -- --require-hashes
        remedy=' Does it serve other files than PyPI, whose hashes differ: make LOCKED=no ...'
        ;;
esac
echo "Installing $requirements into $venv (once; a few minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" \
    --requirement "$requirements" ||
    fail "the packages of $requirements could not be installed (see above); is the package index" \
        "reachable, or behind a proxy (HTTPS_PROXY, PIP_INDEX_URL)?$remedy"
