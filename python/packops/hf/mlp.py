"""Gated MLPs of one model (SwiGLU, GeGLU): the gate and the projection behind it run through :func:`packops.gated_linear`.

transformers writes them as ``down_proj(act(gate) * up)``; autograd then keeps four matrices of the intermediate size where two
say everything. What a module computes is found by asking it, not by its name: see :func:`recognise`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import gated_activation, gated_linear
from ..reference import gated_linear as reference
from . import rewrite
from .loss import is_plain_linear
from .record import Record, is_replaced

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


class GatedMLP(NamedTuple):
    """A module that computes ``down_proj(act(gate) * up)``."""

    inputs: tuple[str, ...]  # the projections: of gate and up, or one whose halves they are
    activation: str


def patch(model: nn.Module, record: Record) -> None:
    """Replace the gated MLPs of ``model``, except where somebody else replaced one."""
    count = 0
    for name, module in model.named_modules():
        if is_replaced(module) or (mlp := recognise(module)) is None:
            continue
        record.set_forward(name, module, MethodType(_forward(mlp), module))
        count += 1
    if count:
        record.say("mlp", f"packops.gated_linear in {count} modules")


@cache
def _forward(mlp: GatedMLP) -> Callable[[Any, Tensor], Tensor]:
    """One object for equal MLPs, so that torch.compile compiles them once."""
    inputs, activation = mlp

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        parts = [getattr(self, name)(hidden_states) for name in inputs]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        down = self.down_proj
        if is_plain_linear(down):
            return gated_linear(gate, up, down.weight, down.bias, activation=activation)  # type: ignore[arg-type]
        return down(gated_activation(gate, up, activation=activation))  # type: ignore[arg-type]

    return forward


def recognise(module: nn.Module) -> GatedMLP | None:
    """How ``module`` computes its gated MLP, or None if it computes anything else.

    Its class's ``forward`` is asked with a few numbers and small projections of our own, on the CPU, so its own device, weights
    and hooks do not matter.
    """
    children = dict(module.named_children())
    inputs = next(
        (names for names in (("gate_proj", "up_proj"), ("gate_up_proj",)) if {*names, "down_proj"} <= {*children}), None
    )
    if inputs is None or module._parameters or module._buffers:
        return None
    kind = rewrite.class_of(module)
    if len(inspect.signature(kind.forward).parameters) != 2:  # self and x
        return None
    hidden, columns = 3, 5
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def projection(outputs: int, features: int) -> nn.Linear:
        linear = nn.Linear(features, outputs, bias=False, device="meta")
        linear.weight = nn.Parameter(draw(outputs, features), requires_grad=False)
        return linear

    twin = copy.copy(module)
    widths = {"down_proj": (hidden, columns)} | {name: (columns * 2 // len(inputs), hidden) for name in inputs}
    ours = {name: projection(*width) for name, width in widths.items()}
    twin._modules = {**module._modules, **ours}
    x = draw(2, 4, hidden)
    with torch.no_grad():
        parts = [ours[name](x) for name in inputs]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        try:
            found = kind.forward(twin, x)
        except Exception:  # it takes no such input
            return None
        for activation in ACTIVATIONS:
            want = reference(gate, up, ours["down_proj"].weight, activation=activation)
            if isinstance(found, Tensor) and found.shape == want.shape and torch.allclose(found, want, rtol=1e-6, atol=1e-6):
                return GatedMLP(inputs, activation)
    return None
