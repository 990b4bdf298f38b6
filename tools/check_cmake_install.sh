#!/usr/bin/env bash
# Installs the CMake build and builds docs/cpp.md's programs against it, outside the source tree: as a C++ user would.
#   tools/check_cmake_install.sh [BUILD_FOLDER [PYTHON]]     after: make cpp
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/cmake} python=${2:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cmake --install "$build" --prefix "$work/packops" > "$work/install.log"
"$python" - "$work" <<'PY'
import re, sys
from pathlib import Path
work, page = Path(sys.argv[1]), Path("docs/cpp.md").read_text()
blocks = re.findall(r"^```(?:cpp|cmake)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
with_torch, lists, alone = blocks
for folder, program, text in (
    ("ops", with_torch, lists),
    ("kernels", alone, lists.replace("find_package(Torch REQUIRED)\n", "").replace("${TORCH_LIBRARIES} packops::ops", "packops::kernels")),
):
    (work / folder).mkdir()
    (work / folder / "main.cpp").write_text(program)
    (work / folder / "CMakeLists.txt").write_text(text)
PY
torch=$("$python" -c "import torch; print(torch.utils.cmake_prefix_path)")
for program in ops kernels; do
  cmake -S "$work/$program" -B "$work/$program/build" -DCMAKE_PREFIX_PATH="$torch;$work/packops" > "$work/$program/cmake.log" 2>&1 \
    || { cat "$work/$program/cmake.log"; exit 1; }
  cmake --build "$work/$program/build" > "$work/$program/build.log" 2>&1 || { cat "$work/$program/build.log"; exit 1; }
  said=$("$work/$program/build/example" | grep -E '^ *0 ' | tr -s ' ' | sed 's/^ //; s/ $//')
  test "$said" = "0 1 2 0 1 0" || { echo "docs/cpp.md: the $program program said: $said"; exit 1; }
  echo "docs/cpp.md: the $program program builds against the installed package and says 0 1 2 0 1 0"
done
