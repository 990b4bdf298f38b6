"""Autocast: a public op casts what torch's own op of that kind would cast, eager and compiled; float64 is left alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Cast = Callable[[str, tuple], tuple]  #: (device type, the op's tensors) -> the tensors as autocast would have them


is_any: Callable[[], bool] = torch._C._is_any_autocast_enabled


def cast_to(dtype: torch.dtype, x: Tensor | None) -> Tensor | None:
    if x is None or x.dtype == dtype or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    return x.to(dtype)


def is_on(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def off(device_type: str) -> AbstractContextManager[Any]:
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def lower_precision(device_type: str, tensors: tuple) -> tuple:
    """As linear layers and attention."""
    if not is_on(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(cast_to(dtype, x) for x in tensors)


def promoted(device_type: str, tensors: tuple) -> tuple:
    """As products of elements: autocast leaves them alone, and torch computes in the wider dtype."""
    if not is_on(device_type):
        return tensors
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        if x is not None:
            dtype = torch.promote_types(dtype, x.dtype)
    return tuple(cast_to(dtype, x) for x in tensors)


def norm(device_type: str, tensors: tuple) -> tuple:
    """As :func:`torch.nn.functional.rms_norm`: in fp32 on CUDA, in the dtype of the input on the CPU."""
    if not is_on(device_type):
        return tensors
    dtype = torch.float32 if device_type == "cuda" else tensors[0].dtype
    return tuple(cast_to(dtype, x) for x in tensors)


def register(kernels: torch.library.Library, name: str, public: Any, cast: Cast, keywords: tuple[str, ...] = ()) -> None:
    """Let the public op cast under autocast. ``keywords``: which tensors among its options are cast, too."""

    def implement(device_type: str, key: str) -> None:
        without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def call(*tensors: Any, **options: Any) -> Any:
            made = cast(device_type, (*tensors, *(options.get(key) for key in keywords)))
            options |= zip(keywords, made[len(tensors) :], strict=True)
            with torch._C._ExcludeDispatchKeyGuard(without):
                return public(*made[: len(tensors)], **options)

        kernels.impl(name, call, key)

    implement("cpu", "AutocastCPU")
    implement("cuda", "AutocastCUDA")
