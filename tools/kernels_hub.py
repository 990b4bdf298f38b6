"""Write the layout that the builder of the Hugging Face kernels hub takes, from csrc/: build/kernels-hub.

    python tools/kernels_hub.py [FOLDER [OWNER/NAME]]       OWNER/NAME: the repository on the hub to upload to

The hub builds the sources itself, against the stable ABI, and gives every build a namespace of its own, which packops takes as
PACKOPS_NAMESPACE (csrc/torch/register.h). Flags belong to a kernel there, so the torch glue is among each kernel's sources. The
Python half is thin: the raw ops, without the gradients and fake kernels of the package. Nothing here runs the hub's builder: it
needs Nix and a network. In FOLDER: `kernel-builder build`, then `kernel-builder upload`.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

PACKAGE = '''"""The ops of packops, raw: for training, with gradients, install packops itself."""

from ._ops import ops

__all__ = ["ops"]
'''
# The builder is a Nix flake, and the layout one that uses it.
FLAKE = """\
{
  description = "packops: kernels for packed LLM training";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
# The builder fills this in and shows it on the hub.
CARD = """\
---
library_name: kernels
license: {{ license }}
---

The raw ops of packops, for the `kernels` library: no gradients, no fake kernels. For training, install packops itself.

```python
from kernels import get_kernel

packops = get_kernel("{{ repo_id }}", version={{ version }})
packops.ops.rms_norm  # and every other op
```
"""
# The builder writes registration.h. Loading the library registers the ops; this makes it a module, which can be imported.
BINDING = """\
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
"""


def listing(paths: list[Path]) -> str:
    return "[\n" + "".join(f'  "{path.relative_to(ROOT).as_posix()}",\n' for path in sorted(paths)) + "]"


def build_toml(repository: str | None) -> str:
    """``build.toml``: the torch glue, the kernels of the CPU and those of CUDA, with the flags of csrc/build.json."""
    hub = f"""
[general.hub]
repo-id = "{repository}"
"""
    config = json.loads((CSRC / "build.json").read_text())
    shared = [path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h", ".cuh") and path.name != "bindings.cpp"]
    device = list(CSRC.rglob("*.cu"))
    capabilities = [item.removesuffix("+PTX") for item in config["cuda_arch_list"].split(";")]
    config["defines"].append("PACKOPS_NAMESPACE=TORCH_EXTENSION_NAME")  # of this build, as the hub's builder defines it
    cxx = [*config["cxx_flags"], *(f"-D{define}" for define in config["defines"])]
    nvcc = [*config["nvcc_flags"], *(f"-D{define}" for define in [*config["defines"], *config["cuda_defines"]])]
    version = runpy.run_path(str(ROOT / "python" / "packops" / "_version.py"))["__version__"]
    return f"""\
# Made by tools/kernels_hub.py from csrc/ of packops {version}.
[general]
name = "packops"
version = 0
edition = 5
license = "Apache-2.0"
backends = ["cuda", "cpu"]
{hub if repository else ""}
[torch]
stable-abi = "2.10"
src = ["torch-ext/torch_binding.cpp"]

[kernel.packops]
backend = "cuda"
depends = ["torch"]
cuda-capabilities = {json.dumps(capabilities)}
include = ["csrc"]
cxx-flags = {json.dumps(cxx)}
cuda-flags = {json.dumps(nvcc)}
src = {listing([*shared, *device])}

[kernel.packops_cpu]
backend = "cpu"
depends = ["torch"]
include = ["csrc"]
cxx-flags = {json.dumps(cxx)}
src = {listing(shared)}
"""


def write(folder: Path, repository: str | None = None) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("bindings.cpp"))
    package = folder / "torch-ext" / "packops"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (package.parent / "torch_binding.cpp").write_text(BINDING)
    (folder / "build.toml").write_text(build_toml(repository))
    (folder / "flake.nix").write_text(FLAKE)
    (folder / "CARD.md").write_text(CARD)
    shutil.copy(ROOT / "LICENSE", folder)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "kernels-hub"
    write(target, *sys.argv[2:3])
    print(f"wrote {target}")
