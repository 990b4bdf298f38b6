"""RMS norms of one model: on CUDA each runs through :func:`packops.rms_norm`, elsewhere through torch's ``rms_norm``.

transformers writes an RMS norm as some eight elementwise operations, and more of them backward; each reads and writes all hidden
states, most of them in fp32. Here the norm's ``forward`` is exchanged, for the instance, and rounds once, at its end.

What a module computes is found by asking it, not by its name: see :func:`recognise`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.functional import rms_norm

from .. import _C, functional, has_cuda
from . import rewrite
from .record import Record, is_bare

LONGEST_ROW: int = _C.constants()["rms_norm_row_bytes"]


class RMSNorm(NamedTuple):
    """A module that computes ``x / sqrt(mean(x²) + eps) * weight`` over the last dimension."""

    kind: Any  # its class
    eps: str  # the attribute
    zero_centered: bool  # the factor is 1 + weight

    def methods(self, base: Any) -> dict[str, Callable]:
        return {"forward": _forward(self)}


def patch(model: nn.Module, record: Record, absorbed: Iterable[nn.Module] = ()) -> None:
    """Replace the RMS norms of ``model``, except for those that RoPE has ``absorbed`` and where somebody else replaced one."""
    if count := len(record.set_found(model, recognise, leave=absorbed)):
        record.replaced("rms_norm", f"packops.rms_norm (torch's on the CPU) in {count} modules")


@cache
def _forward(norm: RMSNorm) -> Callable[[Any, Tensor], Tensor]:
    """One object for equal norms, so that torch.compile compiles them once."""
    kind, eps, zero_centered = norm

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if isinstance(hidden_states, Proxy):  # of torch.fx.symbolic_trace, whose dtype nobody knows
            return kind.forward(self, hidden_states)
        weight, dtype = self.weight, hidden_states.dtype
        if is_taken(hidden_states, weight):
            return functional.rms_norm(hidden_states, weight, eps=getattr(self, eps), zero_centered=zero_centered)
        if zero_centered:  # 1 + weight has more digits than 16 bits hold
            wide = torch.promote_types(dtype, torch.float32)
            hidden_states, weight = hidden_states.to(wide), 1 + weight.to(wide)
        elif weight.dtype != dtype:  # torch has no fused kernel for it, and families differ in what dtype they return
            return kind.forward(self, hidden_states)
        return rms_norm(hidden_states, weight.shape, weight, getattr(self, eps)).to(dtype)  # autocast makes it fp32

    return forward


def form_of(module: Any) -> RMSNorm | None:
    """What :func:`patch` found, where its replacement alone says what the module does now."""
    _, methods = vars(type(module)).get("_packops", (None, None))
    return methods if isinstance(methods, RMSNorm) and is_bare(module) else None


def is_taken(x: Tensor, weight: Tensor) -> bool:
    """Whether packops normalises ``x``. Under autocast it would in fp32, as torch does, where rows are half as long."""
    return weight.dtype == x.dtype and has_kernel(x) and not torch.is_autocast_enabled("cuda")


def has_kernel(x: Tensor) -> bool:
    """Whether :func:`packops.rms_norm` takes such an ``x`` on CUDA; on the CPU torch's own is the faster one."""
    row = x.shape[-1] * x.element_size()
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return has_cuda and x.is_cuda and known and row % 16 == 0 and 0 < row <= LONGEST_ROW


def recognise(module: nn.Module) -> RMSNorm | None:
    """How ``module`` computes its RMS norm, or None if it computes anything else.

    Its class's ``forward`` is asked with a few numbers and another weight, on the CPU, so its own device and hooks do not matter.
    """
    kind, weight = rewrite.class_of(module), module._parameters.get("weight")
    eps = next((e for e in ("variance_epsilon", "eps") if isinstance(getattr(module, e, None), float)), None)
    alone = len(list(module.parameters())) == 1 and not list(module.buffers())  # nothing else that it could compute with
    if eps is None or weight is None or not alone or weight.dim() != 1 or not weight.numel():
        return None
    if len(inspect.signature(kind.forward).parameters) != 2:  # self and x: no gate, no residual
        return None
    generator = torch.Generator().manual_seed(0)
    gain = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    x = torch.randn(2, 3, *weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    value = getattr(module, eps)
    sizes = [max(value, 1e-12) ** 0.5, 1.0, 100.0]  # at the first, epsilon matters
    x *= torch.tensor(sizes, dtype=x.dtype, device="cpu")[:, None]
    twin = copy.copy(module)  # its own dictionary of parameters, so that nothing is copied to or from a device
    twin._parameters = {**module._parameters, "weight": nn.Parameter(gain, requires_grad=False)}
    with torch.no_grad():
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + value)
        try:
            found = kind.forward(twin, x)
        except Exception:  # it takes no such input
            return None
        for zero_centered in (False, True):
            want = normed * (gain + zero_centered)
            if isinstance(found, Tensor) and found.shape == want.shape and torch.allclose(found, want, rtol=1e-4, atol=1e-5):
                return RMSNorm(kind, eps, zero_centered)
    return None
