#!/usr/bin/env bash
# Every tested family of models, packed against padded, under other versions of transformers than the installed one.
#   tools/check_transformers.sh [VERSION...]       PYTHON=.venv/bin/python ARGS="-k llama" are taken from the environment
# Each version goes into build/transformers/VERSION, in front of what is installed; nothing else changes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
failed=()
[ $# -gt 0 ] || set -- 5.0.0 5.10.4 5.17.0 5.24.0
for version in "$@"; do
  overlay=$PWD/build/transformers/$version
  if [ ! -d "$overlay/transformers" ]; then
    "$python" -m pip install --quiet --disable-pip-version-check --target "$overlay" "transformers==$version"
    rm -rf "$overlay"/numpy* # the one that torch and packops were installed with
  fi
  echo "==== transformers $version"
  # shellcheck disable=SC2086
  PYTHONPATH=$overlay:$PWD/python "$python" -m pytest -q -p no:cacheprovider tests/test_hf_families.py ${ARGS:-} || failed+=("$version")
done
[ ${#failed[@]} = 0 ] || { echo "failed with transformers ${failed[*]}"; exit 1; }
