"""Gated MLPs of one model: ``down_proj(act(gate) * up)`` through :func:`packops.gated_mlp`, which keeps half as much.

What a module computes is found by asking it, not by its name: see :func:`recognise`.
"""

from __future__ import annotations

import collections
import copy
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.functional import linear

from ..functional import Activation, gated_activation, gated_linear, gated_mlp
from ..reference import gated_activation as exact
from . import rewrite
from .record import Record, is_bare, is_plain_linear


class GatedMLP(NamedTuple):
    """A module that computes ``down_proj(act(gate) * up)``."""

    kind: Any  # its class
    fused: bool  # gate and up are the halves of gate_up_proj, not gate_proj and up_proj
    act: str | None  # the submodule
    act_kind: tuple[Any, ...] | None  # ... its class, and its options
    activation: Activation

    def methods(self, base: Any) -> dict[str, Callable]:
        return {"forward": _forward(self)}

    def origins(self, base: Any) -> dict[str, Any]:
        return {} if self.act_kind is None else {f"{self.act_kind[0].__qualname__}.forward": self.act_kind[0].forward}


def patch(model: nn.Module, record: Record) -> None:
    """Replace the gated MLPs of ``model``, except where somebody else replaced one."""
    changed = record.set_found(model, recognise)
    counts = collections.Counter(op.__name__ for op in map(op_of, changed))
    if changed:
        record.replaced("mlp", ", ".join(f"packops.{op} in {count} modules" for op, count in counts.items()))


def op_of(module: Any) -> Callable[..., Tensor]:
    """The op for a gated MLP: as much of it as weights alone say."""
    if not is_plain_linear(module.down_proj):
        return gated_activation
    first = (module.gate_up_proj,) if "gate_up_proj" in module._modules else (module.gate_proj, module.up_proj)
    return gated_mlp if all(map(is_plain_linear, first)) else gated_linear


def weights_of(module: Any) -> tuple[Any, Any, Any, Any, Any, Any]:
    """The weights and biases of gate, up and down, in the order of :func:`packops.gated_mlp`."""
    down = module.down_proj
    if "gate_up_proj" in module._modules:
        both = module.gate_up_proj
        (gate, up), (gate_bias, up_bias) = both.weight.chunk(2), (None, None) if both.bias is None else both.bias.chunk(2)
        return gate, up, down.weight, gate_bias, up_bias, down.bias
    gate, up = module.gate_proj, module.up_proj
    return gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias


@cache
def _forward(mlp: GatedMLP) -> Callable[[Any, Tensor], Tensor]:
    """One object for equal modules, so that torch.compile compiles them once."""
    kind, fused, act, act_kind, activation = mlp

    def forward(self: Any, x: Tensor) -> Tensor:
        # Another one was put in its place, or somebody wants to see what the activation sees.
        if act is not None and not (kind_of(getattr(self, act)) == act_kind and is_bare(getattr(self, act))):
            return kind.forward(self, x)
        if isinstance(x, Proxy):  # of torch.fx.symbolic_trace, which no op takes for a tensor
            return kind.forward(self, x)
        op = op_of(self)
        if op is gated_mlp:
            gate, up, *others = weights_of(self)
            if gate.requires_grad or up.requires_grad or not torch.is_grad_enabled():
                return gated_mlp(x, gate, up, *others, activation=activation)
            op = gated_linear  # frozen projections need no x in the backward pass, which gated_mlp would keep
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if fused else (self.gate_proj(x), self.up_proj(x))
        if op is gated_linear:
            return gated_linear(gate, up, self.down_proj.weight, self.down_proj.bias, activation=activation)
        return self.down_proj(gated_activation(gate, up, activation=activation))

    return forward


def recognise(module: nn.Module) -> GatedMLP | None:
    """How ``module`` computes its gated MLP, or None if it computes anything else.

    Its class's ``forward`` is asked with a few numbers and small projections in the place of its own, on the CPU.
    """
    kind, children = rewrite.class_of(module), set(module._modules)
    fused = "gate_up_proj" in children
    projections = ["gate_up_proj", "down_proj"] if fused else ["gate_proj", "up_proj", "down_proj"]
    rest = sorted(children.difference(projections))
    if not children.issuperset(projections) or len(rest) > 1 or module._parameters or module._buffers:
        return None
    act = rest[0] if rest else None  # or a function
    if act is not None and (not is_bare(getattr(module, act)) or getattr(module, act).state_dict()):
        return None
    if len(inspect.signature(kind.forward).parameters) != 2:  # self and x
        return None

    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    hidden, columns = 3, 5
    shapes = [(2 * columns, hidden), (hidden, columns)] if fused else [(columns, hidden), (columns, hidden), (hidden, columns)]
    weights = [(numbers(*shape), numbers(shape[0])) for shape in shapes]
    sizes = torch.tensor([0.1, 1.0, 10.0, 1000.0], dtype=torch.float64, device="cpu")[:, None, None]  # some gates are clamped
    x = sizes * numbers(len(sizes), 32, hidden)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout may be on
        twin = copy.copy(module)
        twin.training = True
        twin._modules = {**module._modules, **{n: _linear(*w) for n, w in zip(projections, weights, strict=True)}}
        try:
            found = kind.forward(twin, x)
        except Exception:  # it takes no such input
            return None
    made = [linear(x, *w) for w in weights[:-1]]
    gate, up = made[0].chunk(2, dim=-1) if fused else made
    for activation in get_args(Activation):
        want = linear(exact(gate, up, activation=activation), *weights[-1])
        same = isinstance(found, Tensor) and found.shape == want.shape
        if same and torch.allclose(found / sizes, want / sizes, rtol=1e-5, atol=1e-6):
            return GatedMLP(kind, fused, act, None if act is None else kind_of(getattr(module, act)), activation)
    return None


def kind_of(act: Any) -> tuple[Any, ...]:
    """Equal for activations that compute the same: ``nn.GELU`` is two functions, by an option."""
    return type(act), *(getattr(act, name) for name in getattr(act, "__constants__", ()))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    module = nn.Linear(1, 1, device="meta")
    module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)
    return module
