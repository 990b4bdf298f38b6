"""Fake kernels and autograd of RMS norm + RoPE.

``qk_norm_rope`` is differentiable, compiles and exports; ``_qk_norm_rope`` is the same kernel without autograd, which
:func:`packops.apply_qk_norm_rope` calls directly.
"""

from __future__ import annotations

import torch

from .rope import check_tables_are_constant, empty_heads_like, feature_contiguous, mark_constants


class QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, raw_backward, q, k, q_weight, k_weight, cos, sin, position_ids, cu_seqlens, options):
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, position_ids, cu_seqlens)
        ctx.raw_backward, ctx.options = raw_backward, options
        outputs = raw(q, k, q_weight, k_weight, cos, sin, position_ids, cu_seqlens, *options)
        mark_constants(ctx, needed(ctx.needs_input_grad[2:6]), outputs)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_q, grad_k):
        return None, None, *gradients(ctx.raw_backward, grad_q, grad_k, ctx.saved_tensors, ctx.options), *(None,) * 5


def needed(flags: tuple) -> tuple[bool, bool]:
    """Whether the outputs for q and k need a gradient, from the flags of q, k, q_weight, k_weight."""
    return flags[0] or flags[2], flags[1] or flags[3]


def gradients(raw_backward, grad_q, grad_k, saved, options):
    k = saved[1]
    grad_k = None if k is None else torch.zeros_like(k) if grad_k is None else feature_contiguous(grad_k)
    return raw_backward(feature_contiguous(grad_q), grad_k, *saved, *options)


def register(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    raw_backward = ops._qk_norm_rope_backward.default
    option_names = [argument.name for argument in ops.qk_norm_rope.default._schema.arguments if argument.kwarg_only]

    @torch.library.register_fake(f"{namespace}::qk_norm_rope")
    @torch.library.register_fake(f"{namespace}::_qk_norm_rope")
    def _(q, k, *args, **options):
        return empty_heads_like(q), None if k is None else empty_heads_like(k)

    @torch.library.register_fake(f"{namespace}::_qk_norm_rope_backward")
    def _(q_grad, k_grad, q, k, q_weight, k_weight, *args, **options):
        def empty(x, like):
            return None if x is None else like(x)

        return empty_heads_like(q), empty(k, empty_heads_like), torch.empty_like(q_weight), empty(k_weight, torch.empty_like)

    def setup_context(ctx, inputs, keyword_only_inputs, output):
        check_tables_are_constant(*inputs[4:6])
        ctx.save_for_backward(*inputs)
        ctx.options = tuple(keyword_only_inputs[name] for name in option_names)
        mark_constants(ctx, needed(ctx.needs_input_grad[:4]), output)

    def backward(ctx, grad_q, grad_k):
        return *gradients(raw_backward, grad_q, grad_k, ctx.saved_tensors, ctx.options), *(None,) * 4

    torch.library.register_autograd(f"{namespace}::qk_norm_rope", backward, setup_context=setup_context)
