"""Loads the native library once, and says clearly why it could not."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

MINIMUM_TORCH = (2, 10)
NVIDIA_DRIVER = Path("/dev/nvidiactl")


def load() -> ModuleType:
    """Import ``packops._C``, which registers ``torch.ops.packops.*``."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise ImportError(f"packops needs torch >= {'.'.join(map(str, MINIMUM_TORCH))}, found {torch.__version__}")
    if "packops._C" not in sys.modules and has_ops("packops"):  # two libraries with one op end the process
        raise second_time("packops")
    try:
        library = importlib.import_module("packops._C")
    except ModuleNotFoundError as error:
        if error.name != "packops._C":
            raise
        raise ImportError(
            "packops: the native library packops._C is not built. In a checkout run "
            "`pip install --no-build-isolation -e .`; a source tree on sys.path hides an installed wheel."
        ) from error
    except ImportError as error:
        raise ImportError(f"packops: the native library could not be loaded under torch {torch.__version__}: {error}") from error
    if not library.build_info()["cuda"] and sees_gpu():
        warnings.warn(
            "packops was built without CUDA kernels, and this machine has a GPU. Put nvcc on the PATH, or set CUDA_HOME, and "
            "install again; `packops info` says more",
            stacklevel=3,
        )
    return library


def has_ops(namespace: str) -> bool:
    return any(name.startswith(namespace + "::") for name in torch._C._dispatch_get_all_op_names())


def second_time(namespace: str) -> ImportError:
    return ImportError(
        f"packops: torch.ops.{namespace} has ops already. A process can import packops once, and not beside another library of "
        "its ops (torch.ops.load_library): start a new process, in a notebook restart the kernel"
    )


def sees_gpu() -> bool:
    """Whether torch could use an NVIDIA GPU of this machine, without asking CUDA: an import must not start it (fork)."""
    return torch.version.cuda is not None and NVIDIA_DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
