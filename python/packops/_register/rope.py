"""Fake kernels and autograd of the RoPE ops.

``rope`` is differentiable, compiles and exports; ``rope_`` rotates in place, under autograd too. ``_rope`` and ``_rope_`` are the
same kernels without autograd, which :func:`packops.apply_rope` calls directly; their ``transposed`` is the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_libraries: list[torch.library.Library] = []  # a registration ends with its Library


def empty_heads_like(heads: Tensor) -> Tensor:
    """The outputs of rope ops: the memory order of the input, features contiguous."""
    out = torch.empty_like(heads)
    return out if out.stride(-1) == 1 or out.shape[-1] == 1 else heads.new_empty(heads.shape)


def feature_contiguous(grad: Tensor | None) -> Tensor | None:
    """Gradients come expanded and strided in every way; the kernels read any strides but the last."""
    return grad if grad is None or grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()


def rotate_back(raw: Any, grad_q: Tensor | None, grad_k: Tensor | None, tables: tuple, options: tuple, transposed: bool):
    """The gradients of q and k, in one launch, each where there is one. ``tables``: cos, sin, position_ids, cu_seqlens."""
    if grad_q is None and grad_k is None:
        return None, None
    first, second = (grad_k, None) if grad_q is None else (grad_q, grad_k)
    first, second = feature_contiguous(first), feature_contiguous(second)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        first, second = Rope.apply(raw, first, second, *tables, options, transposed)
    else:
        first, second = raw(first, second, *tables, *options, transposed)
    return (None, first) if grad_q is None else (first, second)


def mark_constants(ctx: Any, needed: tuple, outputs: tuple) -> None:
    """The rotation of what needs no gradient needs none, although its partner does."""
    ctx.mark_non_differentiable(*(x for need, x in zip(needed, outputs, strict=True) if not need and x is not None))


class Rope(torch.autograd.Function):
    """RoPE through a raw op. Its gradient is itself, transposed, so it can be differentiated any number of times."""

    @staticmethod
    def forward(ctx, raw, q, k, cos, sin, position_ids, cu_seqlens, options, transposed):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin, position_ids, cu_seqlens)
        ctx.raw, ctx.options, ctx.transposed = raw, options, transposed
        outputs = raw(q, k, cos, sin, position_ids, cu_seqlens, *options, transposed)
        mark_constants(ctx, ctx.needs_input_grad[1:3], outputs)
        return outputs

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        need_q, need_k = ctx.needs_input_grad[1:3]
        grads = (grad_q if need_q else None, grad_k if need_k else None)
        return None, *rotate_back(ctx.raw, *grads, ctx.saved_tensors, ctx.options, not ctx.transposed), *(None,) * 6


class RopeInPlace(torch.autograd.Function):
    """Rotates one tensor in place. One, because autograd allows no more where one of them may be a view."""

    @staticmethod
    def forward(ctx, raw, raw_in_place, heads, cos, sin, position_ids, cu_seqlens, options):
        ctx.save_for_backward(cos, sin, position_ids, cu_seqlens)
        ctx.raw, ctx.options = raw, options
        ctx.mark_dirty(heads)
        raw_in_place(heads, None, cos, sin, position_ids, cu_seqlens, *options)
        return heads

    @staticmethod
    def backward(ctx, grad):
        grad, _ = rotate_back(ctx.raw, grad, None, ctx.saved_tensors, ctx.options, True)
        return None, None, grad, *(None,) * 5


def check_tables_are_constant(cos: Tensor, sin: Tensor) -> None:
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("packops.rope: cos and sin need a gradient, but RoPE is differentiable in q and k only: detach them")


def given(options: tuple) -> tuple:
    """What of the options to pass on: nothing where all have their defaults, since parsing seven takes torch a microsecond."""
    return () if options == (None, None, 0, False, None, False, False) else options


def rotate_in_place(raw: Any, raw_in_place: Any, q: Tensor, k: Tensor | None, tables: tuple, options: tuple) -> None:
    """In one launch where autograd takes no part, else one by one."""
    tensors = (q,) if k is None else (q, k)
    if not torch.is_grad_enabled() or not any(heads.requires_grad for heads in tensors):
        raw_in_place(q, k, *tables, *given(options))
        torch.autograd.graph.increment_version(tensors)
        return
    check_tables_are_constant(*tables[:2])
    for name, heads in zip("qk", tensors, strict=False):
        if heads.requires_grad and heads.is_leaf:
            raise ValueError(
                f"packops.rope: {name} is a leaf that needs a gradient, so it cannot be rotated in place: use inplace=False, "
                "or torch.no_grad() where no gradient shall flow"
            )
    for heads in tensors:
        RopeInPlace.apply(raw, raw_in_place, heads, *tables, options)


def register(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    raw, raw_in_place = ops._rope.default, ops._rope_.default
    option_names = [argument.name for argument in ops.rope.default._schema.arguments if argument.kwarg_only]

    @torch.library.register_fake(f"{namespace}::rope")
    @torch.library.register_fake(f"{namespace}::_rope")
    def _(q, k, cos, sin, *args, **options):
        return empty_heads_like(q), None if k is None else empty_heads_like(k)

    @torch.library.register_fake(f"{namespace}::rope_")
    @torch.library.register_fake(f"{namespace}::_rope_")
    def _(q, k, cos, sin, *args, **options):
        return None

    def setup_context(ctx, inputs, keyword_only_inputs, output):
        ctx.set_materialize_grads(False)
        _, _, cos, sin, position_ids, cu_seqlens = inputs
        check_tables_are_constant(cos, sin)
        ctx.save_for_backward(cos, sin, position_ids, cu_seqlens)
        ctx.options = tuple(keyword_only_inputs[name] for name in option_names)
        mark_constants(ctx, ctx.needs_input_grad[:2], output)

    def backward(ctx, grad_q, grad_k):
        need_q, need_k = ctx.needs_input_grad[:2]
        grads = (grad_q if need_q else None, grad_k if need_k else None)
        return *rotate_back(raw, *grads, ctx.saved_tensors, ctx.options, True), *(None,) * 4

    torch.library.register_autograd(f"{namespace}::rope", backward, setup_context=setup_context)

    defaults = {argument.name: argument.default_value for argument in ops.rope_.default._schema.arguments}

    def in_place(q, k, cos, sin, position_ids=None, cu_seqlens=None, **keywords):
        options = tuple(keywords.get(name, defaults[name]) for name in option_names)
        rotate_in_place(raw, raw_in_place, q, k, (cos, sin, position_ids, cu_seqlens), options)

    library = torch.library.Library(namespace, "FRAGMENT")
    library.impl("rope_", in_place, "Autograd")
    _libraries.append(library)
