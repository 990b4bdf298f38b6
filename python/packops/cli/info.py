"""``packops info``: what this installation is and what it can use."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from typing import Any

import torch

import packops
from packops import _build
from packops.data.counts import counted

EXTRAS = {
    "jit": ("filelock", "platformdirs", "setuptools", "ninja"),
    "hf": ("transformers", "accelerate"),
    "trl": ("transformers", "accelerate", "trl"),
    "demo": ("matplotlib", "tqdm", "transformers", "tokenizers"),
}


def main(args: argparse.Namespace) -> int:
    print(format_info(info()))
    return 0


def info() -> dict[str, Any]:
    """What this installation is and what it can use: plain values, for ``packops info`` and for bug reports."""
    build = packops._C.build_info()
    cuda = f"CUDA {build['cuda']}, for {build['cuda_archs'].replace('_', ', ')}" if build["cuda"] else "none, a CPU-only build"
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("PACKOPS_")]
    facts: dict[str, Any] = {
        "packops": packops.__version__,
        "library": packops._C.__file__,
        "built from": _sources(build["sources"]),
        "compiler": build["compiler"],
        "torch": f"{torch.__version__} (packops needs {_target(build['torch_target'])} or newer)",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "CPU kernels": f"{build['cpu_isa']}, {counted(torch.get_num_threads(), 'thread')}",
        "CUDA kernels": cuda,
        "GPU": _gpus(build),
        "environment": ", ".join(variables) or "no PACKOPS_* variable is set",
    }
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        facts[f"extra {extra}"] = f"missing {', '.join(missing)}: pip install '.[{extra}]'" if missing else "usable"
    return facts | {"in short": _summary(build)}


def _summary(build: dict[str, str]) -> str:
    """What a user most needs to know, as the last line."""
    if not torch.cuda.is_available():
        return "the CPU kernels are usable" + (
            "; the CUDA kernels are there, but this torch sees no GPU" if build["cuda"] else ""
        )
    if not build["cuda"]:
        return "this torch sees a GPU, but packops was built WITHOUT CUDA kernels: put nvcc on the PATH and install again"
    capabilities = (torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if any(coverage(capability, build["cuda_archs"]).startswith("NOT") for capability in capabilities):
        return "the CPU kernels are usable, the CUDA kernels NOT on every GPU here"
    return "the CPU and the CUDA kernels are usable"


def _sources(digest: str) -> str:
    try:
        same = _build.source_digest(_build.find_csrc()) == digest
    except FileNotFoundError:
        return digest[:12]
    return f"{digest[:12]} (csrc as it is now)" if same else f"{digest[:12]}, but csrc has CHANGED since: build again"


def _target(hexadecimal: str) -> str:
    version = int(hexadecimal, 16)
    return f"{version >> 56}.{version >> 48 & 0xFF}"


def _gpus(build: dict[str, str]) -> str:
    if not torch.cuda.is_available():
        return "none" + ("" if torch.version.cuda else " (this torch is CPU-only)")
    found = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        covered = coverage(capability, build["cuda_archs"])
        found.append(f"{torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}: {covered}")
    return "; ".join(found)


def coverage(capability: tuple[int, int], archs: str) -> str:
    """How kernels built for ``archs`` (``"8.0_9.0_12.0+PTX"``) run on a GPU of this compute capability.

    Machine code runs on its own major version from its minor one on; PTX is compiled by the driver for anything newer.
    """
    items = [item for item in archs.split("_") if item]
    if not items:
        return "NOT usable, packops was built without CUDA kernels"
    for item in items:
        major, minor = (int(part.rstrip("af")) for part in item.removesuffix("+PTX").split("."))
        specific = item.removesuffix("+PTX")[-1] in "af"
        if major == capability[0] and (minor == capability[1] if specific else minor <= capability[1]):
            return "covered"
    for item in items:
        if item.endswith("+PTX"):
            major, minor = (int(part) for part in item.removesuffix("+PTX").split("."))
            if (major, minor) <= capability:
                return "covered by PTX, which the driver compiles at the first launch"
    return f"NOT covered by this build: rebuild with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"


def format_info(facts: dict[str, Any]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
