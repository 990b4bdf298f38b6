"""Fake kernels and autograd of the gate of a gated MLP, and the gate together with the projection behind it.

Of ``down_proj(act(gate) * up)`` autograd keeps four (tokens, columns) matrices: gate, up, act(gate) and the product. Here it
keeps gate and up: the backward pass reads both anyway, and makes the product again while it makes their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


class GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, raw_backward, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.raw_backward, ctx.activation = raw_backward, activation
        return raw(gate, up, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        _, *grads = ctx.raw_backward(grad, *ctx.saved_tensors, ctx.activation, False, *ctx.needs_input_grad[2:4])
        return None, None, *grads, None


class GatedLinear(torch.autograd.Function):
    """``linear(gated_activation(gate, up), weight, bias)``."""

    @staticmethod
    def forward(ctx, raw, raw_backward, gate, up, weight, bias, activation):
        ctx.save_for_backward(gate, up, weight)
        ctx.raw, ctx.raw_backward, ctx.activation = raw, raw_backward, activation
        return linear(raw(gate, up, activation), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        need_gate, need_up, need_weight, need_bias = ctx.needs_input_grad[2:6]
        product: Any = None
        grad_gate = grad_up = grad_weight = grad_bias = None
        if need_gate or need_up:
            product, grad_gate, grad_up = ctx.raw_backward(
                grad @ weight, gate, up, ctx.activation, need_weight, need_gate, need_up
            )
        elif need_weight:
            product = ctx.raw(gate, up, ctx.activation)
        if need_weight:
            grad_weight = matrix(grad).t() @ matrix(product)
        if need_bias:
            grad_bias = matrix(grad).sum(0)
        return None, None, grad_gate, grad_up, grad_weight, grad_bias, None


def matrix(x: Tensor) -> Tensor:
    return torch.atleast_2d(x).flatten(0, -2)


def register(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    raw_backward = ops._gated_activation_backward.default

    def empty(gate: Tensor) -> Tensor:
        return gate.new_empty(gate.shape)

    @torch.library.register_fake(f"{namespace}::gated_activation")
    @torch.library.register_fake(f"{namespace}::_gated_activation")
    def _(gate, up, activation="silu"):
        return empty(gate)

    @torch.library.register_fake(f"{namespace}::_gated_activation_backward")
    def _(grad, gate, up, activation, with_product=True, with_gate=True, with_up=True):
        return tuple(empty(gate) if wanted else None for wanted in (with_product, with_gate, with_up))

    def setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.activation = keyword_only_inputs["activation"]

    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return tuple(raw_backward(grad, *ctx.saved_tensors, ctx.activation, False, *ctx.needs_input_grad)[1:])

    torch.library.register_autograd(f"{namespace}::gated_activation", backward, setup_context=setup_context)
