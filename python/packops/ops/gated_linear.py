"""The gate of a gated MLP, and the gate together with the projection behind it.

Of ``down_proj(act(gate) * up)`` autograd keeps four (tokens, columns) matrices: gate, up, act(gate) and the product. Here it
keeps gate and up: the backward pass reads both anyway, and makes the product again while it makes their gradients.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from .._errors import raise_typed
from .op import Op

__all__ = ["Activation", "gated_activation", "gated_linear"]

Activation = Literal["silu", "gelu_tanh", "gelu"]


class GatedActivation(Op):
    name = "gated_activation"
    differentiable = ("gate", "up")

    def fake(self, gate: Tensor, up: Tensor, *options: Any, **keywords: Any) -> Tensor:
        return gate.new_empty(gate.shape)

    def fake_backward(
        self,
        grad: Tensor,
        gate: Tensor,
        up: Tensor,
        activation: str,
        with_product: bool = True,
        with_gate: bool = True,
        with_up: bool = True,
    ) -> tuple:
        return tuple(gate.new_empty(gate.shape) if wanted else None for wanted in (with_product, with_gate, with_up))

    def gradients(self, grads: tuple, saved: tuple, options: tuple, needs: tuple[bool, ...]) -> tuple:
        return tuple(self.raw_backward(*grads, *saved, *options, False, *needs)[1:])


def register(namespace: str) -> None:
    GatedActivation(namespace).register()


_OP = GatedActivation("packops")


def gated_activation(gate: Tensor, up: Tensor, *, activation: Activation = "silu") -> Tensor:
    """``act(gate) * up``, the gate of a SwiGLU or GeGLU, in one pass forward and one backward; autograd keeps gate and up only.

    Args:
        gate, up: (..., columns) of one dtype, bf16, fp16 or fp32 (fp64 on the CPU). The last dimension is contiguous, rows may
            lie apart: the two halves of a fused projection are not copied.
        activation: ``"silu"``, ``"gelu_tanh"`` (the tanh approximation) or ``"gelu"`` (erf).

    Returns:
        The product, contiguous, computed in fp32 (fp64 for fp64) and rounded once. Differentiable once, in gate and up.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value; it is named.
    """
    return cast(Tensor, _OP((gate, up), (activation,)))


class GatedLinear(torch.autograd.Function):
    """``linear(gated_activation(gate, up), weight, bias)``."""

    @staticmethod
    def forward(ctx: Any, op: Op, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.op, ctx.activation = op, activation
        return linear(op.raw(gate, up, activation), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        gate, up, weight = ctx.saved_tensors
        need_gate, need_up, need_weight, need_bias = ctx.needs_input_grad[1:5]
        product: Any = None
        grad_gate = grad_up = grad_weight = grad_bias = None
        if need_gate or need_up:
            product, grad_gate, grad_up = ctx.op.raw_backward(
                grad @ weight, gate, up, ctx.activation, need_weight, need_gate, need_up
            )
        elif need_weight:
            product = ctx.op.raw(gate, up, ctx.activation)
        if need_weight:
            grad_weight = matrix(grad).t() @ matrix(product)
        if need_bias:
            grad_bias = matrix(grad).sum(0)
        return None, grad_gate, grad_up, grad_weight, grad_bias, None


def matrix(x: Tensor) -> Tensor:
    return torch.atleast_2d(x).flatten(0, -2)


def gated_linear(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = "silu"
) -> Tensor:
    """``linear(act(gate) * up, weight, bias)``, the second half of a gated MLP. Autograd keeps gate, up and weight.

    Eager code keeps act(gate) and the product as well, twice the memory. Here the backward pass makes the product anew, in the
    kernel that makes the gradients of gate and up. What needs no gradient costs no matrix product.

    Args:
        gate, up, activation: as in :func:`gated_activation`.
        weight: (features, columns), of their dtype: a plain tensor.
        bias: (features,) or None.

    Returns:
        (..., features). Under autocast all inputs are cast as for a linear layer. Differentiable once.

    Raises:
        TypeError, ValueError: as :func:`gated_activation`.
    """
    kind = gate.device.type
    if torch.is_autocast_enabled(kind):
        gate, up, weight = (_autocast(x, kind) for x in (gate, up, weight))
        bias = None if bias is None else _autocast(bias, kind)
    _check_projection(gate, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (gate, up, weight, bias)):
        try:
            return GatedLinear.apply(_OP, gate, up, weight, bias, activation)
        except RuntimeError as error:
            raise_typed(error)
    return linear(gated_activation(gate, up, activation=activation), weight, bias)


def _autocast(x: Tensor, kind: str) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(kind))


def _check_projection(gate: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Errors that name the arguments of :func:`gated_linear`; torch's would name those of a product."""
    columns = gate.shape[-1] if gate.dim() else 1
    if weight.dim() != 2 or weight.shape[1] != columns:
        raise ValueError(
            f"packops.gated_linear: weight must have shape (features, {columns}) for gate {tuple(gate.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    for name, x, shape in (("weight", weight, weight.shape), ("bias", bias, weight.shape[:1])):
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(f"packops.gated_linear: {name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.dtype != gate.dtype:
            raise TypeError(f"packops.gated_linear: {name} must have the dtype of gate, {gate.dtype}, got {x.dtype}")
        if x.device != gate.device:
            raise ValueError(f"packops.gated_linear: {name} must be on the device of gate, {gate.device}, got {x.device}")
