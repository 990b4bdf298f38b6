"""A gated MLP, ``down_proj(act(gate_proj(x)) * up_proj(x))``, as one op.

Autograd keeps x, gate and up. On Hopper two steps are matrix products of packops' own (csrc/gated_mlp.h), which compute the gate
and its gradients in their epilogues: that of gate and up, and that of the gradient of what is between. So nothing of the gate is
a pass over memory by itself.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import autocast
from .arguments import check_plain
from .gated_linear import Activation, check_operand, empty_gradients, matrix, project
from .op import Composed, register_fake

__all__ = ["gated_mlp"]

WEIGHTS = "Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight"
# Below, a product has too few tiles for all multiprocessors, and torch's, which may also cut its sums, is as fast or faster.
LEAST_TOKENS = 1024

_PLAIN = (Tensor, torch.nn.Parameter)


class GatedMLP(Composed):
    name = "gated_mlp"
    differentiable = ("x", "gate_weight", "up_weight", "down_weight", "gate_bias", "up_bias", "down_bias")
    cast = staticmethod(autocast.lower_precision)
    signature = f"{WEIGHTS}, Tensor? gate_bias=None, Tensor? up_bias=None, Tensor? down_bias=None", 'str activation="silu"'
    returns = "(Tensor, Tensor gate, Tensor up)"
    saved = f"{WEIGHTS}, Tensor gate, Tensor up"
    unkept: ClassVar[dict[str, Any]] = {"keep": False}

    def __init__(self, namespace: str):
        ops = getattr(torch.ops, namespace)
        self.activate, self.activate_backward = ops._gated_activation.default, ops._gated_activation_backward.default
        self.products, self.products_backward = ops._gated_mlp_products.default, ops._gated_mlp_products_backward.default
        super().__init__(namespace)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        down_weight: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: str,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        check(x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
        gate: Any = None
        up: Any = None
        product: Any = None
        if gate_bias is None and up_bias is None and is_large(x):
            gate, up, product = self.products(x, gate_weight, up_weight, activation, keep)
        if product is None:
            gate, up = linear(x, gate_weight, gate_bias), linear(x, up_weight, up_bias)
            product = self.activate(gate, up, activation)
        result = project(product, down_weight, down_bias)
        return (result, gate, up) if keep else (result, None, None)

    def backward(  # type: ignore[override]
        self,
        grad: Tensor,
        x: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        down_weight: Tensor,
        gate: Tensor,
        up: Tensor,
        activation: str,
        needs: list[bool],
    ) -> tuple[Tensor | None, ...]:
        need_x, need_gate_weight, need_up_weight, need_down_weight, need_gate_bias, need_up_bias, need_down_bias = needs
        product: Any = None
        grad_gate: Any = None
        grad_up: Any = None
        if need_x or need_gate_weight or need_up_weight or need_gate_bias or need_up_bias:
            if is_large(grad):
                product, grad_gate, grad_up = self.products_backward(grad, down_weight, gate, up, activation, need_down_weight)
            if grad_gate is None:
                product, grad_gate, grad_up = self.activate_backward(grad @ down_weight, gate, up, activation, need_down_weight)
            grad_gate, grad_up = matrix(grad_gate), matrix(grad_up)
        elif need_down_weight:
            product = self.activate(gate, up, activation)
        rows, grads = matrix(x), matrix(grad)
        return (
            (grad_gate @ gate_weight).addmm_(grad_up, up_weight).view(x.shape) if need_x else None,
            grad_gate.t() @ rows if need_gate_weight else None,
            grad_up.t() @ rows if need_up_weight else None,
            grads.t() @ matrix(product) if need_down_weight else None,
            grad_gate.sum(0) if need_gate_bias else None,
            grad_up.sum(0) if need_up_bias else None,
            grads.sum(0) if need_down_bias else None,
        )

    def fake(self, *arguments: Any, keep: bool = True, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, gate_weight, _, down_weight, *_ = arguments
        check(*arguments[:7])
        gate = x.new_empty((*x.shape[:-1], gate_weight.shape[0]) if keep else (0,))
        return x.new_empty((*x.shape[:-1], down_weight.shape[0])), gate, torch.empty_like(gate)

    def fake_backward(self, grad: Tensor, *arguments: Any) -> tuple:
        *tensors, _, _, _, needs = arguments
        return empty_gradients(grad, (*(x.shape for x in tensors), *(x.shape[:1] for x in tensors[1:])), needs)

    def keep(self, ctx: Any, tensors: tuple, outputs: Any) -> Any:
        result, gate, up = outputs
        ctx.save_for_backward(*tensors[:4], gate, up, *tensors[4:6])
        return result

    def gradients(self, grads: tuple, saved: tuple, options: tuple, needs: tuple[bool, ...]) -> tuple:
        """Reads no bias. They are kept because gate and up depend on them: a second derivative shall not pass them by."""
        return super().gradients(grads, saved[:6], options, needs)


_OPS: dict[str, GatedMLP] = {}  # by namespace


def register(namespace: str) -> None:
    for name in ("_gated_mlp_products", "_gated_mlp_products_backward"):  # which fake tensors reach outside their mode
        register_fake(namespace, name, lambda *_: (None, None, None))
    _OPS[namespace] = GatedMLP(namespace)
    _OPS[namespace].register()


def is_large(x: Tensor) -> bool:
    return x.is_cuda and x.numel() >= LEAST_TOKENS * x.shape[-1]


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: Activation = "silu",
) -> Tensor:
    """``linear(act(linear(x, gate_weight)) * linear(x, up_weight), down_weight)``, the MLP of Llama, Qwen and Gemma.

    Autograd keeps x, gate and up: as much as with :func:`gated_linear`, half of eager code. On Hopper the gate and its gradients
    are computed within two of the matrix products: with bf16 or fp16, sizes that are multiples of 8, ``"silu"`` or
    ``"gelu_tanh"``, contiguous operands, 1024 tokens or more, and in the forward without biases of gate and up. Elsewhere they
    are passes of their own.

    Args:
        x: (..., features), bf16, fp16 or fp32 (fp64 on the CPU).
        gate_weight, up_weight: (columns, features), of x's dtype. The halves of one fused weight will do.
        down_weight: (results, columns).
        gate_bias, up_bias: (columns,) or None.
        down_bias: (results,) or None.
        activation: as in :func:`gated_activation`.

    Returns:
        (..., results). gate and up are rounded to x's dtype, the activation is computed in fp32 (fp64) and rounded once. Under
        autocast all inputs are cast as for a linear layer. Differentiable once, in all tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value; it is named.
    """
    tensors = (x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    return cast(Tensor, _OPS["packops"](tensors, (activation,), type(activation) is str))


def check(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> None:
    """Errors that name the arguments; torch's would name those of a product."""
    if (  # nearly always
        gate_bias is up_bias is down_bias is None
        and all(type(tensor) in _PLAIN and tensor.layout == torch.strided for tensor in (x, gate_weight, up_weight, down_weight))
        and x.dim() > 0
        and gate_weight.dim() == down_weight.dim() == 2
        and gate_weight.shape == up_weight.shape == (down_weight.shape[1], x.shape[-1])
        and x.dtype == gate_weight.dtype == up_weight.dtype == down_weight.dtype
        and x.device == gate_weight.device == up_weight.device == down_weight.device
    ):
        return
    names = GatedMLP.differentiable
    given = dict(zip(names, (x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias), strict=True))
    for name, tensor in given.items():
        if tensor is not None:
            check_plain("packops.gated_mlp", name, tensor)
    if x.dim() == 0:
        raise ValueError("packops.gated_mlp: x must have shape (..., features), got a 0-d tensor")
    if gate_weight.dim() != 2 or gate_weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"packops.gated_mlp: gate_weight must have shape (columns, {x.shape[-1]}) for x {tuple(x.shape)}, got "
            f"{tuple(gate_weight.shape)}"
        )
    columns = gate_weight.shape[0]
    if down_weight.dim() != 2 or down_weight.shape[1] != columns:
        raise ValueError(
            f"packops.gated_mlp: down_weight must have shape (results, {columns}) for gate_weight {tuple(gate_weight.shape)}, "
            f"got {tuple(down_weight.shape)}"
        )
    wide, narrow = gate_weight.shape, down_weight.shape
    shapes = (x.shape, wide, wide, narrow, wide[:1], wide[:1], narrow[:1])
    for (name, tensor), shape in zip(given.items(), shapes, strict=True):
        check_operand("gated_mlp", name, tensor, shape, "x", x)
