"""Write the layout that the builder of the Hugging Face kernels hub takes, from csrc/: build/kernels-hub.

    python tools/kernels_hub.py [FOLDER]

The hub builds the sources itself, against the stable ABI, and gives every build a namespace of its own, which packops takes as
PACKOPS_NAMESPACE (csrc/torch/register.h). The Python half is thin: the raw ops, without the gradients and fake kernels of the
package. Nothing here runs the hub's builder: it needs Nix and a network.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"


PACKAGE = '''"""The ops of packops, raw: for training, with gradients, install packops itself."""

from ._ops import ops

__all__ = ["ops"]
'''


def version() -> str:
    spec = importlib.util.spec_from_file_location("version", ROOT / "python" / "packops" / "_version.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.__version__


def listing(paths: list[Path]) -> str:
    return "[\n" + "".join(f'  "{path.relative_to(ROOT).as_posix()}",\n' for path in sorted(paths)) + "]"


def build_toml() -> str:
    """``build.toml``: the torch glue, the kernels of the CPU and those of CUDA, with the flags of csrc/build.json."""
    config = json.loads((CSRC / "build.json").read_text())
    headers = [path for suffix in ("h", "cuh") for path in CSRC.rglob(f"*.{suffix}")]
    glue = [*(CSRC / "torch").glob("*.cpp"), *(CSRC / "torch").glob("*.h")]
    host = [path for folder in (CSRC, CSRC / "common") for path in folder.glob("*.cpp") if path.name != "bindings.cpp"]
    device = [path for folder in (CSRC, CSRC / "common") for path in folder.glob("*.cu")]
    kernel_headers = [path for path in headers if path.parent != CSRC / "torch"]
    capabilities = [item.removesuffix("+PTX") for item in config["cuda_arch_list"].split(";")]
    config["defines"].append("PACKOPS_NAMESPACE=TORCH_EXTENSION_NAME")  # of this build, as the hub's builder defines it
    cxx = [*config["cxx_flags"], *(f"-D{define}" for define in config["defines"])]
    nvcc = [*config["nvcc_flags"], *(f"-D{define}" for define in [*config["defines"], *config["cuda_defines"]])]
    return f"""\
# Made by tools/kernels_hub.py from csrc/ of packops {version()}.
[general]
name = "packops"
universal = false

[torch]
src = {listing(glue)}
include = ["csrc"]
minver = "2.10"

[kernel.packops]
backend = "cuda"
depends = ["torch"]
cuda-capabilities = {json.dumps(capabilities)}
include = ["csrc"]
cxx-flags = {json.dumps(cxx)}
cuda-flags = {json.dumps(nvcc)}
src = {listing([*host, *device, *kernel_headers])}

[kernel.packops_cpu]
backend = "cpu"
depends = ["torch"]
include = ["csrc"]
cxx-flags = {json.dumps(cxx)}
src = {listing([*host, *kernel_headers])}
"""


def write(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("bindings.cpp"))
    package = folder / "torch-ext" / "packops"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (folder / "build.toml").write_text(build_toml())
    for name in ("LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "kernels-hub"
    write(target)
    print(f"wrote {target}")
