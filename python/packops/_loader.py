"""Loads the native library once, and says clearly why it could not."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

MINIMUM_TORCH = (2, 10)


def load() -> ModuleType:
    """Import ``packops._C``, which registers ``torch.ops.packops.*``."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise ImportError(f"packops needs torch >= {'.'.join(map(str, MINIMUM_TORCH))}, found {torch.__version__}")
    try:
        return importlib.import_module("packops._C")
    except ModuleNotFoundError as error:
        if error.name != "packops._C":
            raise
        raise ImportError(
            "packops: the native library packops._C is not built. In a checkout run "
            "`pip install --no-build-isolation -e .`; a source tree on sys.path hides an installed wheel."
        ) from error
    except ImportError as error:
        raise ImportError(f"packops: the native library could not be loaded under torch {torch.__version__}: {error}") from error
