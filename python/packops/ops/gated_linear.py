"""The gate of a gated MLP, and the gate together with the projection behind it.

Of ``down_proj(act(gate) * up)`` autograd keeps four (tokens, columns) matrices: gate, up, act(gate) and the product. Here it
keeps gate and up: the backward pass reads both anyway, and makes the product again while it makes their gradients.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import autocast
from .arguments import check_plain
from .op import Composed, Op

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


class GatedLinear(Composed):
    name = "gated_linear"
    differentiable = ("gate", "up", "weight", "bias")
    cast = staticmethod(autocast.lower_precision)
    signature = "Tensor gate, Tensor up, Tensor weight, Tensor? bias=None", 'str activation="silu"'
    saved = "Tensor gate, Tensor up, Tensor weight"

    def __init__(self, namespace: str, activation: GatedActivation):
        self.activation = activation
        super().__init__(namespace)

    def forward(self, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:  # type: ignore[override]
        check_projection(gate, weight, bias)
        return project(self.activation.raw(gate, up, activation), weight, bias)

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor, activation: str, needs: list[bool]) -> tuple:  # type: ignore[override]
        need_gate, need_up, need_weight, need_bias = needs
        product: Any = None
        grad_gate: Any = None
        grad_up: Any = None
        if need_gate or need_up:
            product, grad_gate, grad_up = self.activation.raw_backward(
                grad @ weight, gate, up, activation, need_weight, need_gate, need_up
            )
        elif need_weight:
            product = self.activation.raw(gate, up, activation)
        return (
            grad_gate if need_gate else None,
            grad_up if need_up else None,
            matrix(grad).t() @ matrix(product) if need_weight else None,
            matrix(grad).sum(0) if need_bias else None,
        )

    def fake(self, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **options: Any) -> Tensor:
        check_projection(gate, weight, bias)
        return gate.new_empty((*gate.shape[:-1], weight.shape[0]))

    def fake_backward(self, grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor, activation: str, needs: list[bool]) -> tuple:
        return empty_gradients(grad, (gate.shape, up.shape, weight.shape, weight.shape[:1]), needs)

    def keep(self, ctx: Any, tensors: tuple, outputs: Any) -> Any:
        ctx.save_for_backward(*tensors[:3])
        return outputs


_OPS: dict[str, tuple[GatedActivation, GatedLinear]] = {}  # by namespace


def register(namespace: str) -> None:
    activation = GatedActivation(namespace)
    _OPS[namespace] = activation, GatedLinear(namespace, activation)
    for op in _OPS[namespace]:
        op.register()


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`linear`, which with a bias may be a view; a view that a Function returns cannot be changed in place."""
    return linear(x, weight, bias).detach()


def matrix(x: Tensor) -> Tensor:
    return torch.atleast_2d(x).flatten(0, -2)


def empty_gradients(grad: Tensor, shapes: tuple, needs: list[bool]) -> tuple:
    """Gradients without values: of these shapes, or none where nobody wants them."""
    return tuple(grad.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


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
    return cast(Tensor, _OPS["packops"][0]((gate, up), (activation,), type(activation) is str))


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
    tensors = (gate, up, weight, bias)
    return cast(Tensor, _OPS["packops"][1](tensors, (activation,), type(activation) is str))


def check_projection(gate: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Errors that name the arguments of :func:`gated_linear`; torch's would name those of a product."""
    check_plain("packops.gated_linear", "weight", weight)  # torch's product takes some sparse ones
    columns = gate.shape[-1] if gate.dim() else 1
    if weight.dim() != 2 or weight.shape[1] != columns:
        raise ValueError(
            f"packops.gated_linear: weight must have shape (features, {columns}) for gate {tuple(gate.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    for name, x, shape in (("weight", weight, weight.shape), ("bias", bias, weight.shape[:1])):
        check_operand("gated_linear", name, x, shape, "gate", gate)


def check_operand(op: str, name: str, x: Tensor | None, shape: tuple[int, ...], first_name: str, first: Tensor) -> None:
    """An error if ``x`` is there, and not of this shape, or of another dtype or device than the op's first argument."""
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f"packops.{op}: {name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.dtype != first.dtype:
        raise TypeError(f"packops.{op}: {name} must have the dtype of {first_name}, {first.dtype}, got {x.dtype}")
    if x.device != first.device:
        raise ValueError(f"packops.{op}: {name} must be on the device of {first_name}, {first.device}, got {x.device}")
