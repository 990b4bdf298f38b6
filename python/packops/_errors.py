"""Native errors as Python errors.

The library throws an exception that asks :func:`error_of` which Python error it is, so every call of an op raises the intended
type: eager, compiled, in a backward pass. A library that was loaded without the Python module (a C++ program, an old copy of
``csrc/``) throws a ``RuntimeError`` that names the type (``packops.IndexError: ...``); :func:`raise_typed` raises that type.
"""

from __future__ import annotations

import re
from typing import NoReturn

import torch

_TYPES: dict[str, type[Exception]] = {
    t.__name__: t for t in (IndexError, ValueError, TypeError, RuntimeError, NotImplementedError, torch.OutOfMemoryError)
}
_PATTERN = re.compile(r"packops\.(\w+): (.*?)(?:\nException raised from|\Z)", re.DOTALL)


def error_of(name: str, message: str) -> Exception:
    """The Python error that the native library means. Called by it; ``name`` is a type, or ``FailedAllocation``."""
    return _failed_allocation(message) if name == "FailedAllocation" else _TYPES[name](message)


def _failed_allocation(request: str) -> Exception:
    """Before 2.13 torch does not tell the library why an allocation failed: ask torch for as much memory, and it says why."""
    device, size = request.split()
    try:
        torch.empty(int(size), dtype=torch.uint8, device=device)
    except Exception as error:  # what the caller of torch would have got
        return error.with_traceback(None)
    # Meanwhile the op has let go of what it had, so now there is room.
    gibibytes = int(size) / 2**30
    if device.startswith("cuda"):
        return torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {gibibytes:.2f} GiB. Device: {device}")
    return RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {size} bytes.")


def raise_typed(error: Exception, op: str | None = None) -> NoReturn:
    """Raise what ``error``'s message names, or ``error`` itself if it names no type.

    ``op``: the op that the user called, where it is made of others; the message names it instead.
    """
    match = _PATTERN.match(str(error))
    if match is not None and match[1] in _TYPES:
        error = _TYPES[match[1]](f"packops.{match[2].strip()}")
    message = str(error)
    if op is not None and message.startswith("packops."):
        error = type(error)(re.sub(r"^packops\.\w+", f"packops.{op}", message))
    raise error from None
