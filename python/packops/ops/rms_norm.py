"""RMS norm of rows. Autograd keeps x and the weight."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from . import autocast
from .op import Op

__all__ = ["rms_norm"]


class RmsNorm(Op):
    name = "rms_norm"
    differentiable = ("x", "weight")
    cast = staticmethod(autocast.norm)

    def fake(self, x: Tensor, weight: Tensor, *options: Any, **keywords: Any) -> Tensor:
        return x.new_empty(x.shape)

    def fake_backward(self, grad: Tensor, x: Tensor, weight: Tensor, *options: Any) -> tuple:
        return x.new_empty(x.shape), weight.new_empty(weight.shape)


def register(namespace: str) -> None:
    RmsNorm(namespace).register()


_OP = RmsNorm("packops")


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, in fp32 (fp64 for fp64) and rounded once.

    The backward pass reads ``x`` and the gradient once, for both of its gradients (torch's fused kernels read them twice); the
    weight's is summed in fp32 in a fixed order, so it is the same bits at every run. Differentiable once.

    Args:
        x: ``(..., columns)``; fp32, bf16 or fp16 (fp64 on the CPU). On CUDA a row is whole 16-byte vectors, and at most 8192
            elements of 16 bits or 4096 of fp32.
        weight: ``(columns,)``, of the dtype of ``x``.
        eps: added to the mean of squares.
        zero_centered: the factor is ``1 + weight`` (Gemma), added in fp32.

    Returns:
        ``(..., columns)``, contiguous, of the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what it got and what it wants.
    """
    return cast(Tensor, _OP((x, weight), (eps, zero_centered), type(eps) is float and zero_centered is False))
