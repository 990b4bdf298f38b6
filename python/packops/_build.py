"""How ``csrc/`` becomes a library: reads ``csrc/build.json`` for setup.py and for the JIT loader.

Standard library only at import time, because setup.py loads this file before packops is installed.
Run as a script it builds one library from one JSON request (see :mod:`packops.jit`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

CUDA_REQUEST = "PACKOPS_CUDA"  # "1": CUDA or an error; "0": never; unset: CUDA when nvcc is there
SOURCE_SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".json")


def find_csrc() -> Path:
    """The folder of the C++ and CUDA sources: inside an installed package, or beside it in the repository."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "csrc", here.parents[1] / "csrc"):
        if (candidate / "build.json").is_file():
            return candidate
    raise FileNotFoundError(f"packops: no csrc/build.json in {here} nor two folders above it")


def source_digest(csrc: Path) -> str:
    """sha256 over every file of ``csrc`` (its path and its content, in sorted order): what a build or a test run speaks of."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*"), key=lambda p: p.relative_to(csrc).as_posix()):
        if path.is_file() and path.suffix in SOURCE_SUFFIXES:
            for part in (path.relative_to(csrc).as_posix().encode(), path.read_bytes()):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def read_config(csrc: Path) -> dict[str, Any]:
    return json.loads((csrc / "build.json").read_text())


def find_cuda_home() -> Path | None:
    """The CUDA toolkit that has an nvcc: $CUDA_HOME, then the PATH, then /usr/local/cuda."""
    on_path = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if on_path:
        candidates.append(str(Path(on_path).resolve().parents[1]))
    candidates.append("/usr/local/cuda")
    for home in candidates:
        # An nvcc on the PATH may be a wrapper that lies outside its toolkit: a toolkit also has the runtime we link.
        if home and (Path(home) / "bin" / "nvcc").is_file() and (Path(home) / "lib64" / "libcudart_static.a").is_file():
            return Path(home)
    return None


def choose_cuda_home() -> Path | None:
    """The toolkit to build with, or None for a CPU-only build; obeys PACKOPS_CUDA."""
    request = os.environ.get(CUDA_REQUEST, "")
    if request not in ("", "0", "1"):
        raise ValueError(f"{CUDA_REQUEST} must be 0, 1 or unset, got {request!r}")
    home = None if request == "0" else find_cuda_home()
    if home is None and request == "1":
        raise RuntimeError(f"{CUDA_REQUEST}=1 asks for CUDA kernels, but no nvcc was found: set CUDA_HOME or put nvcc on PATH")
    if home is None and request == "":
        print(
            "packops: WARNING: nvcc was not found, so this is a CPU-only build. "
            "For CUDA kernels put nvcc on PATH or set CUDA_HOME; PACKOPS_CUDA=0 silences this.",
            file=sys.stderr,
        )
    return home


def arch_flags(arch_list: str) -> list[str]:
    """nvcc -gencode flags for a TORCH_CUDA_ARCH_LIST such as ``"8.0;9.0;12.0+PTX"``."""
    flags = []
    for item in re.split(r"[;, ]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
        if not match:
            raise ValueError(f'TORCH_CUDA_ARCH_LIST: {item!r} is not of the form "9.0", "9.0a" or "9.0+PTX"')
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_arch_list(config: dict[str, Any]) -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or config["cuda_arch_list"]


def nvcc_version(cuda_home: Path) -> str:
    text = subprocess.run([str(cuda_home / "bin" / "nvcc"), "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match[1] if match else "unknown"


def make_extension(
    name: str, csrc: Path, *, python_module: bool, cuda_home: Path | None, defines: tuple[str, ...] = (), root: Path | None = None
):
    """One ``CppExtension`` out of ``csrc/build.json``. ``root``: make source paths relative to it, as setuptools wants."""
    from torch.utils import cpp_extension

    config = read_config(csrc)
    sources = config["kernels"] + config["torch_glue"]
    macros = config["defines"] + list(defines)
    link_flags = list(config["link_flags"])
    if python_module:
        sources = sources + config["python_module"]
        link_flags.append("-Wl,-rpath,$ORIGIN/../torch/lib")
    if cuda_home:
        sources = sources + config["cuda_kernels"]
        arch_list = cuda_arch_list(config)
        # Unquoted, one token each: quotes and semicolons do not survive every shell between here and the compiler.
        archs = re.sub(r"[;, ]+", "_", arch_list.strip())
        macros += config["cuda_defines"] + [f"PACKOPS_CUDA_VERSION={nvcc_version(cuda_home)}", f"PACKOPS_CUDA_ARCHS={archs}"]
        link_flags += [f"-L{cuda_home}/lib64", *config["cuda_link_flags"]]
        # Under a CPU-only torch this is None, and BuildExtension would refuse .cu sources although it can compile them.
        cpp_extension.CUDA_HOME = str(cuda_home)
    macros = ["-D" + macro for macro in macros]
    compile_args = {"cxx": config["cxx_flags"] + macros}
    if cuda_home:
        compile_args["nvcc"] = config["nvcc_flags"] + macros + arch_flags(arch_list)
    base = csrc if root is None else csrc.relative_to(root)
    extension = cpp_extension.CppExtension(
        name,
        [str(base / source) for source in sources],
        include_dirs=[str(csrc), *([f"{cuda_home}/include"] if cuda_home else [])],
        extra_compile_args=compile_args,
        extra_link_args=link_flags,
        depends=[str(base / p.relative_to(csrc)) for p in sorted(csrc.rglob("*")) if p.suffix in (".h", ".cuh", ".json")],
    )
    extension.libraries = []  # CppExtension names libtorch_python and others; link_flags says exactly what is needed
    return extension


def make_build_command():
    """BuildExtension that keeps our own -gencode and -std flags and does not compare CUDA versions with torch's.

    The ops use the stable ABI and a static CUDA runtime, so nvcc need not match the CUDA that torch was built with.
    """
    from torch.utils import cpp_extension

    cpp_extension._check_cuda_version = lambda *args, **kwargs: None
    return cpp_extension.BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)


def build_library(request: dict[str, Any]) -> Path:
    """Build ``csrc`` into ``out_dir/<name>.so``, a library without a Python module in it."""
    from setuptools import Distribution

    csrc, out_dir = Path(request["csrc"]), Path(request["out_dir"])
    cuda_home = Path(request["cuda_home"]) if request["cuda_home"] else None
    extension = make_extension(request["name"], csrc, python_module=False, cuda_home=cuda_home, defines=tuple(request["defines"]))
    command = make_build_command()(Distribution({"name": request["name"], "ext_modules": [extension]}))
    command.build_lib = str(out_dir)
    command.build_temp = str(out_dir / "objects")
    command.ensure_finalized()
    command.run()
    (built,) = out_dir.glob(f"{request['name']}*{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}")
    return built.rename(out_dir / f"{request['name']}.so")


if __name__ == "__main__":
    print(build_library(json.loads(sys.argv[1])))
