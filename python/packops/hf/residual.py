"""Residual sums of one model: where a layer normalises what it has just added up, :func:`packops.add_rms_norm` does both.

A layer goes ``h = residual + h; residual = h; h = self.norm(h)``, or begins with the last two lines, and adds ``residual`` again
behind the next block. So backward the gradient of ``residual`` meets that of the norm's input, and autograd adds them up in a
kernel of its own. The layer's ``forward`` keeps every other line.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..functional import add_rms_norm
from . import rewrite
from .norm import form_of, is_taken
from .record import Record, is_patched

_BOUND = "__packops_add_and_normalise__"
_NOTHING = object()  # None is what a block may return that returns nothing, which no one can add


class Residuals(NamedTuple):
    """A layer, and its norms of residual sums."""

    norms: frozenset[str]  # attributes

    def methods(self, base: Any) -> dict[str, Callable]:
        return {"forward": _forward(base, self.norms)}


def patch(model: nn.Module, record: Record) -> None:
    """Replace the sums in front of those RMS norms that :func:`.norm.patch` has replaced."""
    if count := len(record.set_found(model, recognise)):
        record.replaced("residual", f"packops.add_rms_norm (apart on the CPU) in {count} layers")


def recognise(layer: nn.Module) -> Residuals | None:
    """The norms of residual sums, where a layer has some that are replaced."""
    replaced = {name for name, child in layer._modules.items() if form_of(child) is not None}
    if not replaced or is_patched(layer):
        return None
    kind = rewrite.class_of(layer)
    try:
        definition = rewrite.parse(kind.forward)
        found = Residuals(frozenset(replaced.intersection(site.norm for site in _sites(definition))))
        return found if found.norms and found.methods(kind) else None
    except rewrite.CannotRewriteError:
        return None


def add_and_normalise(norm: Any, first: Any, second: Any = _NOTHING) -> tuple[Any, Any]:
    """``(norm(first + second), first + second)``; without ``second`` the sum is ``first``."""
    form = form_of(norm)
    if form is not None and _is_like(first, second) and is_taken(first, norm.weight):
        added = None if second is _NOTHING else second
        return add_rms_norm(first, added, norm.weight, eps=getattr(norm, form.eps), zero_centered=form.zero_centered)
    total = first if second is _NOTHING else first + second
    return norm(total), total


def _is_like(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or second is _NOTHING:
        return isinstance(first, Tensor)
    return isinstance(second, Tensor) and (second.dtype, second.shape, second.device) == (first.dtype, first.shape, first.device)


# ---- a layer's own lines -------------------------------------------------------------------------------------------------------


class _Site(NamedTuple):
    """``block[begin:end]``, the lines that go."""

    block: list[ast.stmt]
    begin: int
    end: int
    norm: str


def _sites(definition: ast.FunctionDef) -> Iterator[_Site]:
    this = rewrite.self_name(definition)
    for block in rewrite.blocks(definition):
        for i in range(1, len(block)):
            if (norm := _normalised(this, block[i - 1], block[i])) is not None:
                begin = i - 1 - (i > 1 and _is_sum(block[i - 2], rewrite.assigned_name(block[i])))
                yield _Site(block, begin, i + 1, norm)


def _normalised(this: str, kept: ast.stmt, normed: ast.stmt) -> str | None:
    """``norm`` of ``residual = h; h = self.norm(h)``."""
    name, call = rewrite.assigned_name(normed), getattr(normed, "value", None)
    if name is None or not isinstance(call, ast.Call) or call.keywords or len(call.args) != 1:
        return None
    is_kept = rewrite.assigned_name(kept) not in (None, name) and _is_name(getattr(kept, "value", None), name)
    return rewrite.attribute_of(call.func, this) if is_kept and _is_name(call.args[0], name) else None


def _is_sum(statement: ast.stmt, name: str | None) -> bool:
    value = getattr(statement, "value", None)
    return rewrite.assigned_name(statement) == name and isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)


def _is_name(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


@rewrite.cache_of_class
def _forward(cls: type, norms: frozenset[str]) -> FunctionType:
    definition = rewrite.parse(cls.forward)  # type: ignore[attr-defined]
    for site in reversed(list(_sites(definition))):  # from the last on, so that the others stay in their places
        if site.norm in norms:
            *sums, kept, normed = site.block[site.begin : site.end]
            terms = [sums[0].value.left, sums[0].value.right] if sums else [kept.value]  # type: ignore[attr-defined]
            made = ast.unparse(normed.targets[0]), ast.unparse(kept.targets[0])  # type: ignore[attr-defined]
            call = f"{_BOUND}({', '.join(map(ast.unparse, [normed.value.func, *terms]))})"  # type: ignore[attr-defined]
            site.block[site.begin : site.end] = rewrite.statements(f"{', '.join(made)} = {call}", at=normed)
    return rewrite.build(cls.forward, definition, {_BOUND: add_and_normalise})  # type: ignore[attr-defined]
