#!/usr/bin/env bash
# The ABI promise: one built wheel works under torch 2.10 and under the newest torch. Downloads two torches (gigabytes where the
# index serves CUDA builds), so this is run before a release and not on every change; docs/packaging.md records what was seen.
#
#   tools/check_abi_range.sh dist/packops-*.whl [oldest] [newest]
set -euo pipefail
wheel=$1
oldest=${2:-2.10.0}
newest=${3:-}
here=$(dirname "$0")
"$here/check_wheel.sh" "$wheel" "torch==$oldest"
"$here/check_wheel.sh" "$wheel" "torch${newest:+==$newest}"
