"""Projections of one input: where a layer multiplies its input by several weights, the gradients add up in the products.

autograd makes a matrix for each and adds them in kernels of their own, which move three such matrices a sum. Here the second
product adds to the first one's result, and so on, and the sum hides behind the multiplication.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear

from ..ops import autocast
from ..ops.derivatives import transforms_are_active
from . import rewrite
from .record import is_plain_linear, is_plain_tensor

_BOUND = "__packops_project__"


def share_input(definition: ast.FunctionDef) -> dict[str, Callable]:
    """Let neighbouring lines of ``self.q_proj(x)``, ``self.k_proj(x)``, ... take what one call before them has made. Returns the
    names that the changed definition knows; empty where there are no such lines."""
    this, changed = rewrite.self_name(definition), False
    for block in list(rewrite.blocks(definition)):
        for run in reversed(list(_neighbours(this, block))):
            first, call = run[0]
            names = [f"_packops_projected_{i}" for i in range(len(run))]
            arguments = [ast.unparse(call.args[0]), *(ast.unparse(other.func) for _, other in run)]
            for (line, other), name in zip(run, names, strict=True):
                _Exchanged(other, name).visit(line)
            begin, end = block.index(first), block.index(run[-1][0]) + 1
            block[end:end] = rewrite.statements(f"del {', '.join(names)}", at=run[-1][0])  # or they live until the layer returns
            block[begin:begin] = rewrite.statements(f"{', '.join(names)} = {_BOUND}({', '.join(arguments)})", at=first)
            changed = True
    return {_BOUND: project} if changed else {}


@rewrite.cache_of_class
def shares_input(cls: type) -> bool:
    """Whether the ``forward`` of a class has such lines."""
    return bool(share_input(rewrite.parse(cls.forward)))  # type: ignore[attr-defined]


def project(x: Any, *modules: Any) -> tuple[Any, ...]:
    """``module(x)`` for each."""
    if not (_wants_gradient(x) and all(map(is_plain_linear, modules))):
        return tuple(module(x) for module in modules)
    return Projections.apply(x, *(m.weight for m in modules), *(m.bias for m in modules))  # type: ignore[no-any-return]


def _wants_gradient(x: Any) -> bool:
    if not is_plain_tensor(x) or x.is_complex():  # complex ones have conjugate gradients
        return False
    if not (torch.is_grad_enabled() and x.requires_grad):
        return False
    # A compiler finds the sums itself; under autocast the weights are cast; and transforms want rules of their own.
    return not (torch.compiler.is_compiling() or autocast.is_any() or transforms_are_active() or forward_ad._current_level >= 0)


class Projections(torch.autograd.Function):
    """``apply(x, *weights, *biases)``; a bias may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1 : 1 + len(weights)]) else None, *weights)
        # With a bias, linear returns a view, which as one of several results could not be changed in place.
        return tuple(linear(x, weight, bias).detach() for weight, bias in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_x: Tensor | None = None
        of_weights: list[Tensor | None] = [None] * len(weights)
        of_biases = of_weights.copy()
        rows = None if x is None else _rows(x)
        # Autocast was off in the forward pass, and may be on where backward() is called.
        with autocast.off(weights[0].device.type) if autocast.is_any() else nullcontext():
            for i in reversed(range(len(weights))):  # as autograd does, keys and values first: smaller sums are rounded
                if (grad := grads[i]) is None:
                    continue
                grad = _rows(grad)
                if needs[0]:
                    of_x = grad @ weights[i] if of_x is None else of_x.addmm_(grad, weights[i])
                if needs[1 + i] and rows is not None:
                    of_weights[i] = grad.t() @ rows
                if needs[1 + len(weights) + i]:
                    of_biases[i] = grad.sum(0)
        return None if of_x is None else of_x.view(ctx.shape), *of_weights, *of_biases


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# ---- a layer's own lines -------------------------------------------------------------------------------------------------------


def _neighbours(this: str, block: list[ast.stmt]) -> Iterator[list[tuple[ast.stmt, ast.Call]]]:
    """Runs of lines with a projection each, of the same name, which they leave as it is, by different modules."""
    run: list[tuple[ast.stmt, ast.Call]] = []
    for line in [*block, ast.Pass()]:
        call = _projection(this, line)
        if call is not None and run and _is_another(call, [other for _, other in run]):
            run.append((line, call))
            continue
        if len(run) > 1:
            yield run
        run = [] if call is None else [(line, call)]


def _is_another(call: ast.Call, calls: list[ast.Call]) -> bool:
    """Of the same name, by a module that is not among theirs."""
    modules = [ast.unparse(other.func) for other in calls]
    return ast.unparse(call.args[0]) == ast.unparse(calls[0].args[0]) and ast.unparse(call.func) not in modules


def _projection(this: str, line: ast.stmt) -> ast.Call | None:
    """``self.q_proj(x)`` of ``y = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)``, which is always called."""
    node, name = getattr(line, "value", None), rewrite.assigned_name(line)
    while name is not None and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if rewrite.attribute_of(node.func, this) is None:
            node = node.func.value
        elif len(node.args) != 1 or node.keywords:
            return None
        elif not isinstance(node.args[0], ast.Name):
            node = node.args[0]
        else:
            return node if node.args[0].id != name else None
    return None


class _Exchanged(ast.NodeTransformer):
    """One call becomes a name."""

    def __init__(self, call: ast.Call, name: str):
        self.call, self.name = call, name

    def visit_Call(self, node: ast.Call) -> ast.AST:
        return ast.Name(self.name, ast.Load()) if node is self.call else self.generic_visit(node)
