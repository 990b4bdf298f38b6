"""The gate of a gated MLP, and the gate together with the projection behind it.

Of ``down_proj(act(gate) * up)`` autograd keeps four (tokens, columns) matrices: gate, up, act(gate) and the product. Here it
keeps gate and up: the backward pass reads both anyway, and makes the product again while it makes their gradients.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import linear

from . import autocast
from .arguments import check_types, explain
from .derivatives import is_differentiated, no_forward_mode, once, transforms_are_active
from .op import Op

__all__ = ["Activation", "gated_activation", "gated_linear"]

Activation = Literal["silu", "gelu_tanh", "gelu"]


class GatedActivation(Op):
    name = "gated_activation"
    differentiable = ("gate", "up")
    cast = staticmethod(autocast.promoted)

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
_KINDS = {"gate": "Tensor", "up": "Tensor", "weight": "Tensor", "bias": "Tensor?", "activation": "str"}


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
    return cast(Tensor, _OP((gate, up), (activation,), type(activation) is str))


class GatedLinearTraced(torch.autograd.Function):
    """``linear(gated_activation(gate, up), weight, bias)``, as torch.compile traces it."""

    @staticmethod
    def forward(ctx: Any, op: Op, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.op, ctx.activation = op, activation
        return linear(op.raw(gate, up, activation), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        needs = tuple(ctx.needs_input_grad[1:5])
        return None, *linear_gradients(ctx.op, ctx.activation, needs, grad, *ctx.saved_tensors), None


class GatedLinear(GatedLinearTraced):
    """The same, eager: torch.compile could not trace the errors."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        gradients = functools.partial(linear_gradients, ctx.op, ctx.activation, tuple(ctx.needs_input_grad[1:5]))
        with autocast.off(grad.device.type):  # the forward has cast what is to be cast
            return None, *once("gated_linear", gradients, grad, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode("gated_linear")


def linear_gradients(op: Op, activation: str, needs: tuple, grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor) -> tuple:
    """Those of gate, up, weight and bias that are needed."""
    need_gate, need_up, need_weight, need_bias = needs
    product: Any = None
    grad_gate = grad_up = grad_weight = grad_bias = None
    if need_gate or need_up:
        product, grad_gate, grad_up = op.raw_backward(grad @ weight, gate, up, activation, need_weight, need_gate, need_up)
    elif need_weight:
        product = op.raw(gate, up, activation)
    if need_weight:
        grad_weight = matrix(grad).t() @ matrix(product)
    if need_bias:
        grad_bias = matrix(grad).sum(0)
    return grad_gate, grad_up, grad_weight, grad_bias


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
    named = (("gate", gate), ("up", up), ("weight", weight), ("bias", bias), ("activation", activation))
    if is_compiling():
        check_types("gated_linear", _KINDS, named)
        gate, up, weight, bias = autocast.lower_precision(gate.device.type, (gate, up, weight, bias))
        _check_projection(gate, weight, bias)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (gate, up, weight, bias)):
            return GatedLinearTraced.apply(_OP, gate, up, weight, bias, activation)
        return linear(torch.ops.packops.gated_activation(gate, up, activation=activation), weight, bias)
    try:
        if torch._C._is_any_autocast_enabled():
            gate, up, weight, bias = autocast.lower_precision(gate.device.type, (gate, up, weight, bias))
        _check_projection(gate, weight, bias)
        tensors = (gate, up, weight, bias)
        if not transforms_are_active() and any(x is not None and is_differentiated(x) for x in tensors):
            return GatedLinear.apply(_OP, gate, up, weight, bias, activation)
        return linear(gated_activation(gate, up, activation=activation), weight, bias)
    except Exception as error:
        explain(error, "gated_linear", _KINDS, named)


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
