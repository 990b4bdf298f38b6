#!/usr/bin/env bash
# A wheel installs into an empty virtual environment and works where there is no source tree.
#
#   tools/check_wheel.sh dist/packops-*.whl [torch requirement, default torch==2.13.0]
#   TORCH_TESTS=1 runs the tests of the ops too, which takes some minutes.
set -euo pipefail
wheel=$(realpath "$1")
torch=${2:-torch==2.13.0}
smoke=$(realpath "$(dirname "$0")/smoke.py")
python=${PYTHON:-python3}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch" "$wheel"

cp "$smoke" "$work/smoke.py"
cd "$work"
unset PYTHONPATH
# -O drops asserts: argument checks must not be asserts, and smoke.py is run both ways because its own checks are.
"$work/venv/bin/python" "$work/smoke.py"
"$work/venv/bin/python" -O -c 'import packops, torch; packops.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))'
"$work/venv/bin/packops" info
if [ "${TORCH_TESTS:-}" = 1 ]; then
  "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pytest hypothesis
  root=$(dirname "$(dirname "$smoke")")
  cp -r "$root"/{tests,tools,csrc,pyproject.toml} "$work/"
  mkdir -p python/packops
  cp "$root/python/packops/_build.py" python/packops/ # the tests name the sources that they speak of; the rest is the wheel's
  "$work/venv/bin/python" -m pytest -q tests/test_{ce_loss,linear_ce_loss,rope,rotary,rms_norm,qk_norm_rope,gated_linear,gated_mlp,attention,metadata,packing,sampler,batch}.py
fi
