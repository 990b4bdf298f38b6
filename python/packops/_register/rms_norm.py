"""Fake kernels and autograd of the RMS norm of rows. Autograd keeps x and the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, raw_backward, x, weight, eps, zero_centered):
        ctx.save_for_backward(x, weight)
        ctx.raw_backward, ctx.options = raw_backward, (eps, zero_centered)
        return raw(x, weight, eps, zero_centered)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, None, *ctx.raw_backward(grad, *ctx.saved_tensors, *ctx.options), None, None


def register(namespace: str) -> None:
    raw_backward = getattr(torch.ops, namespace)._rms_norm_backward.default

    @torch.library.register_fake(f"{namespace}::rms_norm")
    @torch.library.register_fake(f"{namespace}::_rms_norm")
    def _(x, weight, eps, zero_centered=False):
        return x.new_empty(x.shape)

    @torch.library.register_fake(f"{namespace}::_rms_norm_backward")
    def _(grad, x, weight, eps, zero_centered):
        return x.new_empty(x.shape), weight.new_empty(weight.shape)

    def setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.options = (keyword_only_inputs["eps"], keyword_only_inputs["zero_centered"])

    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return tuple(raw_backward(grad, *ctx.saved_tensors, *ctx.options))

    torch.library.register_autograd(f"{namespace}::rms_norm", backward, setup_context=setup_context)
