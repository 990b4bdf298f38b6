"""The command line: ``packops info | demo | bench | pack | verify``.

A command's module is imported when its command is used, so that ``packops info`` works on an installation that lacks what the
others need.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import _build

# name -> (module with add_parser(subparsers) and main(arguments) -> exit status, one line of help, the extra it needs)
COMMANDS = {
    "demo": ("packops.demo", "train the same small Llama padded, packed carelessly, and packed with packops", "demo"),
    "bench": ("packops.cli_bench", "measure the ops of this checkout against the peers that are installed", ""),
    "pack": ("packops.cli_pack", "pack a list of document lengths and say how full the packs are", ""),
    "verify": ("packops.cli_verify", "prove for a model that packed equals unpacked", "hf"),
}
EXTRAS = {
    "jit": ("filelock", "platformdirs", "setuptools", "ninja"),
    "demo": ("matplotlib", "tqdm", "transformers", "tokenizers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="packops", description="Packed LLM training that is exactly the training you meant.")
    parser.add_argument("--version", action="version", version=f"packops {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("info", help="versions, build, device, and what is usable here", description="Say what is usable here.")
    implementation = None
    for name, (module, text, extra) in COMMANDS.items():
        if name in argv[:1]:
            implementation = _import(name, module, extra)
            implementation.add_parser(commands)
        elif importlib.util.find_spec(module):
            commands.add_parser(name, help=text)
    arguments = parser.parse_args(argv)
    if implementation is None:
        print(format_info(info()))
        return 0
    return implementation.main(arguments) or 0


def _import(name: str, module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        foreign = extra and not str(error.name).startswith("packops")
        sys.exit(f"packops {name}: {error}" + (f": pip install 'packops[{extra}]'" if foreign else ""))


def _version() -> str:
    from . import __version__

    return __version__


def info() -> dict[str, Any]:
    """What this installation is and what it can use: plain values, for ``packops info`` and for bug reports."""
    import packops

    build = packops._C.build_info()
    threads = f"{torch.get_num_threads()} threads"
    cuda = f"CUDA {build['cuda']}, for {build['cuda_archs'].replace('_', ', ')}" if build["cuda"] else "none, built without nvcc"
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("PACKOPS_")]
    facts: dict[str, Any] = {
        "packops": packops.__version__,
        "library": packops._C.__file__,
        "built from": _sources(build["sources"]),
        "compiler": build["compiler"],
        "torch": f"{torch.__version__} (packops needs {_target(build['torch_target'])} or newer)",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "CPU kernels": f"{build['cpu_isa']}, {threads}",
        "CUDA kernels": cuda,
        "GPU": _gpus(build),
        "environment": ", ".join(variables) or "no PACKOPS_* variable is set",
    }
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        facts[f"packops[{extra}]"] = f"missing {', '.join(missing)}" if missing else "usable"
    return facts


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
