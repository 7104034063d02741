#!/usr/bin/env bash
# The specification, test_nft.py, with the lowest versions that requirements.txt allows and with the
# newest that pip finds: a new virtual environment for each, which is deleted afterwards.
#
#     bash examples/tests/versions.sh                 # both
#     bash examples/tests/versions.sh lowest          # or newest
#
# It takes some minutes and, with a CUDA build of torch, about 6 GB of the disk in TMPDIR for one
# environment at a time. Where there is no GPU, a CPU build does: let pip find one by its own
# settings, such as PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS. PYTHON names another interpreter; the
# lowest torch has wheels for Python 3.11 to 3.13.
# SPDX-License-Identifier: MIT
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

packages="$work/packages.txt"
python="$work/venv/bin/python"
failed=0
[ $# -gt 0 ] || set -- lowest newest
for end in "$@"; do
    case $end in
        lowest) sed 's/>=/==/' requirements.txt >"$packages" ;;
        newest) cp requirements.txt "$packages" ;;
        *) echo "$0: $end: must be lowest or newest" >&2; exit 2 ;;
    esac
    "${PYTHON:-python3}" -m venv "$work/venv"
    # Of the tests' packages those that test_nft.py needs.
    "$python" -m pip install --quiet -r "$packages" peft pytest pytest-xdist
    "$python" --version
    "$python" -m pip freeze | grep -E '^(torch|diffusers|transformers|numpy|tqdm)=='
    if "$python" -m pytest test_nft.py; then
        echo "$end versions: all well"
    else
        echo "$end versions: FAILED"
        failed=1
    fi
    rm -rf "$work/venv"
done
exit "$failed"
