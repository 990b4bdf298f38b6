"""RoPE.

``rope`` is differentiable, compiles and exports; ``rope_`` rotates in place, under autograd too. ``_rope`` and ``_rope_`` are the
same kernels without autograd, which :func:`packops.apply_rope` calls directly; their ``transposed`` is the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .. import _checks
from .arguments import check_options, check_types, explain, kinds_of
from .derivatives import check_constants, explain_batches, is_differentiated, over_batch, refuse_transforms, transforms_are_active
from .op import below_autograd, library, never_cached, register_fake, typed

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["apply_rope"]

PLAIN = (None, None, 0, False, None, False, False)  # the options' defaults

_ROPE = torch.ops.packops._rope.default
_CALL = getattr(_ROPE, "_op", _ROPE)  # without the Python layer of torch's overload
_ROPE_IN_PLACE = torch.ops.packops._rope_.default
_KINDS = kinds_of(torch.ops.packops.rope.default)
_OPTIONS = tuple(_KINDS)[6:]
_KNOWN: set[tuple] = set()


def empty_heads_like(heads: Tensor) -> Tensor:
    """The outputs of rope ops: the memory order of the input, features contiguous."""
    out = torch.empty_like(heads)
    return out if out.stride(-1) == 1 or out.shape[-1] == 1 else heads.new_empty(heads.shape)


def feature_contiguous(grad: Tensor | None) -> Tensor | None:
    """Gradients come expanded and strided in every way, or as torch's zeros without memory; the kernels read any strides but the
    last."""
    if grad is not None and grad._is_zerotensor():  # which torch expands for them, whatever its strides say
        return torch.zeros_like(grad)
    return grad if grad is None or grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()


def rotate(rope: Any, q: Tensor | None, k: Tensor | None, *arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    """``rope(q, k, *arguments)`` in one launch, where there may be only one of them."""
    if q is None and k is None:
        return None, None
    first, second = (k, None) if q is None else (q, k)
    first, second = rope(feature_contiguous(first), feature_contiguous(second), *arguments)
    return (None, first) if q is None else (first, second)


def rotate_differentiably(raw: Any, q: Tensor | None, k: Tensor | None, tables: tuple, options: tuple, transposed: bool) -> tuple:
    """In a backward pass or a transform: recorded, if it shall be."""
    try:
        if transforms_are_active():
            return rotate(functools.partial(RopeTransformable.apply, raw), q, k, *tables, options, transposed)
        if torch.is_grad_enabled() and not is_compiling():  # create_graph=True
            return rotate(functools.partial(Rope.apply, raw), q, k, *tables, options, transposed)
        return rotate(raw, q, k, *tables, *options, transposed)
    except RuntimeError as error:
        explain_batches("rope", error, (q, k))


def mark_constants(ctx: Any, needed: tuple, outputs: tuple) -> None:
    """The rotation of what needs no gradient needs none, although its partner does."""
    ctx.mark_non_differentiable(*(x for need, x in zip(needed, outputs, strict=True) if not need and x is not None))


class Rope(torch.autograd.Function):
    """RoPE through a raw op. Its gradient is itself, transposed, so it can be differentiated any number of times; its derivative
    in forward mode is itself."""

    @staticmethod
    def forward(ctx, raw, q, k, cos, sin, position_ids, cu_seqlens, options, transposed):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin, position_ids, cu_seqlens)
        ctx.save_for_forward(cos, sin, position_ids, cu_seqlens)
        ctx.raw, ctx.options, ctx.transposed = raw, options, transposed
        outputs = raw(q, k, cos, sin, position_ids, cu_seqlens, *options, transposed)
        if forward_ad._current_level >= 0:  # then q or k may have a tangent alone
            ctx.set_materialize_grads(True)
        else:
            mark_constants(ctx, ctx.needs_input_grad[1:3], outputs)
        return outputs

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        need_q, need_k = ctx.needs_input_grad[1:3]
        grads = (grad_q if need_q else None, grad_k if need_k else None)
        made = rotate_differentiably(ctx.raw, *grads, ctx.saved_tensors, ctx.options, not ctx.transposed)
        return None, *made, *(None,) * 6

    @staticmethod
    def jvp(ctx, _raw, tangent_q, tangent_k, *others):
        return rotate_differentiably(ctx.raw, tangent_q, tangent_k, ctx.saved_tensors, ctx.options, ctx.transposed)


class RopeTransformable(torch.autograd.Function):
    """The same for the transforms of torch.func, which want two steps in the place of one."""

    @staticmethod
    def forward(raw, q, k, cos, sin, position_ids, cu_seqlens, options, transposed):
        return raw(q, k, cos, sin, position_ids, cu_seqlens, *options, transposed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.raw, _, _, *tables, ctx.options, ctx.transposed = inputs
        ctx.set_materialize_grads(forward_ad._current_level >= 0)
        ctx.save_for_backward(*tables)
        ctx.save_for_forward(*tables)

    backward = Rope.backward
    jvp = Rope.jvp

    @staticmethod
    def vmap(info, in_dims, raw, *arguments):
        return over_batch(lambda *parts: RopeTransformable.apply(raw, *parts), info, in_dims[1:], arguments)


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
        grad, _ = rotate_differentiably(ctx.raw, grad, None, ctx.saved_tensors, ctx.options, True)
        return None, None, grad, *(None,) * 5


def check_tables_are_constant(cos: Tensor, sin: Tensor) -> None:
    if cos.requires_grad or sin.requires_grad or forward_ad._current_level >= 0:
        check_constants("rope", {"cos": cos, "sin": sin})


def given(options: tuple) -> tuple:
    """What of the options to pass on: nothing where all have their defaults, since parsing seven takes torch a microsecond."""
    return () if options == PLAIN else options


def rotate_in_place(raw: Any, raw_in_place: Any, q: Tensor, k: Tensor | None, tables: tuple, options: tuple) -> None:
    """In one launch where autograd takes no part, else one by one."""
    tensors = (q,) if k is None else (q, k)
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(heads).tangent is not None for heads in tensors):
        raise RuntimeError("packops.rope: inplace=True has no forward-mode derivative: use inplace=False")
    if torch.is_grad_enabled():
        check_tables_are_constant(*tables[:2])
    if not torch.is_grad_enabled() or not any(heads.requires_grad for heads in tensors):
        raw_in_place(q, k, *tables, *given(options))
        torch.autograd.graph.increment_version(tensors)
        return
    for name, heads in zip("qk", tensors, strict=False):
        check_may_rotate_in_place(name, heads)
    for heads in tensors:
        RopeInPlace.apply(raw, raw_in_place, heads, *tables, options)


def check_may_rotate_in_place(name: str, heads: Tensor) -> None:
    """Before anything is written: autograd would refuse these afterwards, in its own words."""
    if heads.requires_grad and heads.is_leaf:
        raise ValueError(
            f"packops.rope: {name} is a leaf that needs a gradient, so it cannot be rotated in place: use inplace=False, "
            "or torch.no_grad() where no gradient shall flow"
        )
    if heads._is_view() and type(heads.grad_fn).__name__.startswith(("Unbind", "Split", "Chunk", "Unsafe")):
        raise ValueError(
            f"packops.rope: {name} is one of several views that unbind, split or chunk made at once, and autograd lets none of "
            "them be written in place: take a slice (qkv[:, 0]), or use inplace=False"
        )


def register(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    raw, raw_in_place = ops._rope.default, ops._rope_.default
    defaults = {argument.name: argument.default_value for argument in ops.rope.default._schema.arguments if argument.kwarg_only}

    def fake(q, k, cos, sin, *args, **options):
        return empty_heads_like(q), None if k is None else empty_heads_like(k)

    for name in ("rope", "_rope"):
        register_fake(namespace, name, fake)
        register_fake(namespace, f"{name}_", lambda *args, **options: None)
    never_cached(ops.rope_.default, raw_in_place)

    below = below_autograd(ops.rope.default)

    def refuse() -> None:
        refuse_transforms("rope", f"torch.ops.{namespace} has no rules for them; packops.apply_rope without inplace has")

    def autograd(q, k, cos, sin, position_ids=None, cu_seqlens=None, **keywords):
        refuse()
        check_tables_are_constant(cos, sin)
        if is_differentiated(q) or (k is not None and is_differentiated(k)):
            options = tuple({**defaults, **keywords}.values())
            return Rope.apply(raw, q, k, cos, sin, position_ids, cu_seqlens, options, False)
        return below(q, k, cos, sin, position_ids, cu_seqlens, **keywords)

    def in_place(q, k, cos, sin, position_ids=None, cu_seqlens=None, **keywords):
        refuse()
        options = tuple({**defaults, **keywords}.values())
        rotate_in_place(raw, raw_in_place, q, k, (cos, sin, position_ids, cu_seqlens), options)

    kernels = library(namespace)
    kernels.impl("rope", typed(autograd), "Autograd")
    kernels.impl("rope_", typed(in_place), "Autograd")


class RopeOptions(TypedDict, total=False):
    """The keyword arguments of :func:`apply_rope`, for its overloads: what k is decides what comes back for it."""

    position_ids: Tensor | None
    cu_seqlens: Tensor | None
    layout: str | None
    interleaved: bool
    rotary_dim: int | None
    rotary_offset: int
    mrope_section: Sequence[int] | None
    mrope_interleaved: bool
    per_token_table: bool
    inplace: bool


@overload
def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Unpack[RopeOptions]) -> tuple[Tensor, Tensor]: ...
@overload
def apply_rope(q: Tensor, k: None, cos: Tensor, sin: Tensor, **options: Unpack[RopeOptions]) -> tuple[Tensor, None]: ...
@overload
def apply_rope(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, **options: Unpack[RopeOptions]
) -> tuple[Tensor, Tensor | None]: ...
def apply_rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    layout: str | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    per_token_table: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotate query and key heads by their positions (rotary position embedding, Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Every pair ``(x, y)`` of a head becomes ``(x cos - y sin, y cos + x sin)``, in fp32 (fp64 for fp64 input) with one rounding at
    the end. q and k go in one launch, and nothing is copied or converted first. Differentiable in q and k; the gradient is the
    exact transpose, also where ``cos² + sin² != 1`` (YaRN).

    Args:
        q: ``(T, heads, head_dim)``, or 4-D, see ``layout``; bf16, fp16, fp32 (fp64 on the CPU). Any strides with contiguous
            features: transposed views and slices of a fused qkv tensor are read where they lie.
        k: like q with its own number of heads, or None.
        cos, sin: the table, ``(positions, rotary_dim / 2)`` as :func:`rope_table` makes it, or full-width, ``(positions,
            rotary_dim)``, as Hugging Face makes it: column j belongs to feature j, so both halves are alike, or with
            ``interleaved`` neighbours (Cohere, GLM, ERNIE). Any float dtype.
        position_ids: int32 or int64, one per token: ``(T,)``, ``(B, S)`` or ``(1, S)``; ``(3, ...)`` of these with
            ``mrope_section``.
        cu_seqlens: ``(documents + 1,)`` int32 or int64. Positions restart at each document, counted over flattened tokens;
            tokens past the last document pass through unchanged. Together with ``position_ids`` it only says which those are.
            With neither, positions are ``0 .. S-1`` in every batch row (``0 .. T-1`` for ``"thd"``).
        layout: ``"thd"`` for 3-D input; ``"bshd"`` (the default) or ``"bhsd"`` for 4-D input.
        interleaved: pairs are features ``(2i, 2i+1)`` (GPT-J, Meta), not ``(i, i + rotary_dim/2)`` (Hugging Face, GPT-NeoX).
        rotary_dim: how many features of a head turn; the others pass through bit for bit. None: twice the width of ``cos``, or
            its width where twice that is more than a head. A full-width table of at most half a head (partial rotary in Hugging
            Face) therefore needs ``rotary_dim=cos.shape[-1]``. Without it, it raises a ValueError on the CPU, where the table can
            be read, and with :func:`packops.checks`; on CUDA the rotated features of the first tokens are NaN. So does, and are,
            a full-width table whose pairs do not hold one number. Half a table whose frequencies all come twice needs
            ``rotary_dim=2 * cos.shape[-1]``.
        rotary_offset: first feature that turns: 0 for the leading part, ``head_dim - rotary_dim`` for the trailing part (MLA).
        mrope_section: three numbers of pairs that add up to ``rotary_dim / 2``: which of the three ``position_ids`` turns them,
            in contiguous blocks (Qwen2-VL); with ``mrope_interleaved`` axis 1 takes pairs 1, 4, 7, ... below
            ``3 * section[1]``, axis 2 takes 2, 5, 8, ... below ``3 * section[2]``, axis 0 the rest (Qwen3-VL).
        per_token_table: row t of ``cos`` and ``sin`` belongs to token t: ``(T, width)``, ``(B, S, width)`` or ``(1, S, width)``.
        inplace: write over q and k, and return them. Not for leaves that need a gradient.

    Returns:
        ``(q, k)`` rotated; k is None where it was. New tensors are dense, in the memory order of their inputs.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value.
        IndexError: a position outside the table, on the CPU. On CUDA the rotated features of such a token are NaN and their
            gradients 0, unless :func:`packops.checks` is on.
    """
    options = (layout, rotary_dim, rotary_offset, interleaved, mrope_section, mrope_interleaved, per_token_table)
    if inplace is not True and inplace is not False:
        check_types("rope", {"inplace": "bool"}, (("inplace", inplace),))
    if is_compiling():
        check_types("rope", _KINDS, _named(q, k, cos, sin, position_ids, cu_seqlens, options))
        check_tables_are_constant(cos, sin)
        return _apply_rope_compiled(q, k, inplace, cos, sin, position_ids, cu_seqlens, options)
    try:
        if options == PLAIN and interleaved is mrope_interleaved is per_token_table is False:  # 0 == False
            to_pass: tuple = ()
        else:
            check_options("rope", _KINDS, _OPTIONS, options, _KNOWN)
            to_pass = options
        if q.is_cuda and _checks.enabled():
            _checks.raise_bad_positions("rope", q, cos, position_ids, cu_seqlens, layout, per_token_table)
            _checks.raise_full_width_table("rope", q, sin, rotary_dim, interleaved)
        if transforms_are_active():
            if inplace:
                raise RuntimeError(
                    "packops.rope: inplace=True does not work under the transforms of torch.func: use inplace=False"
                )
            check_tables_are_constant(cos, sin)
            return RopeTransformable.apply(_ROPE, q, k, cos, sin, position_ids, cu_seqlens, options, False)
        if inplace:
            rotate_in_place(_ROPE, _ROPE_IN_PLACE, q, k, (cos, sin, position_ids, cu_seqlens), options)
            return q, k
        if torch.is_grad_enabled():
            if cos.requires_grad or sin.requires_grad:
                check_tables_are_constant(cos, sin)
            if q.requires_grad or (k is not None and k.requires_grad):
                return Rope.apply(_ROPE, q, k, cos, sin, position_ids, cu_seqlens, options, False)
        if forward_ad._current_level >= 0:
            check_tables_are_constant(cos, sin)
            return Rope.apply(_ROPE, q, k, cos, sin, position_ids, cu_seqlens, options, False)
        return cast(tuple[Tensor, Tensor | None], _CALL(q, k, cos, sin, position_ids, cu_seqlens, *to_pass))
    except Exception as error:
        explain(error, "rope", _KINDS, _named(q, k, cos, sin, position_ids, cu_seqlens, options))


def _named(*values: Any) -> list[tuple[str, Any]]:
    *tensors, options = values
    return list(zip(_KINDS, (*tensors, *options), strict=True))


def _apply_rope_compiled(
    q: Tensor,
    k: Tensor | None,
    inplace: bool,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    options: tuple,
) -> tuple[Tensor, Tensor | None]:
    keywords = dict(zip(_OPTIONS, options, strict=True), position_ids=position_ids, cu_seqlens=cu_seqlens)
    q_out, k_out = torch.ops.packops.rope(q, k, cos, sin, **keywords)
    if not inplace:
        return q_out, k_out
    # The functional op, then what the caller asked to see: a graph has no use for an in-place autograd function, and inductor has
    # an op write elsewhere where a slice begins at a symbolic offset.
    q.copy_(q_out)
    if k is not None:
        k.copy_(k_out)
    return q, k
