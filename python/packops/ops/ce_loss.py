"""Cross entropy, with the autograd that reads the logits once.

Where the logits need a gradient, the forward kernel also writes d loss / d logits for ``grad_output = 1`` into a buffer. The
backward hands that buffer out; a kernel first rewrites the rows whose ``grad_output`` turns out not to be 1, from the logits,
because scaling a rounded gradient would round it twice. Nothing waits for the device to find out.

Half precision and ``reduction="none"`` form the gradient in the backward only: a loss scale, or per-token weights, would make
the forward's gradient useless, and fp16 could not even hold it.
"""

from __future__ import annotations

import itertools
import math
import operator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from .. import _C, _checks
from .arguments import NUMBERS, check_types, checks_annotations, describe, explain, kinds_of
from .derivatives import (
    check_constants,
    explain_batches,
    has_tangent,
    is_differentiated,
    no_forward_mode,
    once,
    refuse_transforms,
    transforms_are_active,
)
from .op import Transformable, below_autograd, fakes, library, maths_dtype, may_be_saved, never_cached, typed

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CrossEntropyLoss", "CrossEntropyStats", "Reduction", "cross_entropy"]

Reduction = Literal["none", "sum", "mean", "seq-mean-token-mean", "seq-mean-token-sum"]

# Rows of the `floats` and `ints` state tensors, as csrc/torch/ops_ce_loss.cpp lays them out.
SCALE, MAX, SUM, LOSS, ENTROPY = range(5)
TARGET, PREDICTION = range(2)
PARTIAL_STATES: int = _C.constants()["partial_states"]  # numbers per row of a shard's partial state; two more follow

CONSTANTS = ("num_items", "token_weight", "class_weight")  # have no gradient
MATHS = ("class_weight", "label_smoothing", "z_loss", "softcap", "logit_scale")
DEFAULTS: dict[str, Any] = {
    "cu_seqlens": None,
    "shift": False,
    "reduction": "mean",
    "num_items": None,
    "ignore_index": -100,
    "token_weight": None,
    "class_weight": None,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "softcap": None,
    "logit_scale": 1.0,
}


def raw_ops(namespace: str) -> SimpleNamespace:
    """The overloads that the autograd formula is made of, looked up once."""
    ops = getattr(torch.ops, namespace)
    names = ("forward", "forward_", "backward", "backward_")
    overloads = {name: getattr(ops, f"_cross_entropy_{name}").default for name in names}
    # Without the Python layer of torch's overload, as in op.py.
    return SimpleNamespace(**{name: getattr(overload, "_op", overload) for name, overload in overloads.items()})


def graph_is_kept() -> bool:
    """Whether the running backward keeps its graph, so that it may run again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def rows_are_writable(logits: Tensor) -> bool:
    """Whether the kernels can write rows of these strides: contiguous classes, and at most two strided dimensions of rows."""
    rows = [(size, stride) for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True) if size != 1]
    jumps = sum(outer != size * stride for (_, outer), (size, stride) in itertools.pairwise(rows))
    return jumps <= 1 and (logits.shape[-1] <= 1 or logits.stride(-1) == 1)


def may_overlap(x: Tensor) -> bool:
    """Whether two elements may share memory, as expand, unfold and as_strided make it."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride <= reach and size:
            return x.numel() > 0
        reach += (size - 1) * stride
    return False


def is_dense(x: Tensor) -> bool:
    """Whether the elements cover their memory without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return expected > 0


def check_may_overwrite(logits: Tensor, op: str) -> None:
    """An error unless the gradient can take the place of the logits, before anything is written."""
    if has_tangent(logits):
        raise no_forward_mode(op)
    if logits.is_leaf:
        raise ValueError(f"packops.{op}: inplace=True would overwrite a leaf tensor that needs its value; pass a computed one")
    layout = f"got shape {tuple(logits.shape)} with strides {logits.stride()}"
    if may_overlap(logits):
        raise ValueError(
            f"packops.{op}: inplace=True needs logits whose elements do not share memory (expand, unfold or as_strided make such "
            f"views): clone them, {layout}"
        )
    if not rows_are_writable(logits):
        raise ValueError(
            f"packops.{op}: inplace=True needs logits with a contiguous last dimension and at most two strided leading ones, "
            f"{layout}"
        )


class CrossEntropyFunction(torch.autograd.Function):
    """``apply(logits, labels, (ops, options, with_stats, inplace))``: three arguments, since torch spends time on each.

    ``options`` may leave out those at their defaults. Returns the loss; with statistics, or where labels are checked,
    ``loss, floats, ints, counts, sequence_loss``. Only the loss is differentiable.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, call: tuple[SimpleNamespace, dict[str, Any], bool, bool]):
        ops, options, with_stats, inplace = call
        early = logits.dtype != torch.float16 and options.get("reduction") != "none"
        ctx.ops, ctx.early, ctx.inplace = ops, early, inplace
        ctx.maths = {name: value for name, value in options.items() if name in MATHS and name != "class_weight"}
        if inplace and early:
            loss, *stats = ops.forward_(logits, labels, **options, with_stats=with_stats)
            increment_version(logits)
            grad = logits
        else:
            loss, grad, *stats = ops.forward(logits, labels, **options, with_grad=early, with_stats=with_stats)
        ctx.save_for_backward(logits, grad, *stats[:2], options.get("class_weight"))
        ctx.set_materialize_grads(False)
        if not (with_stats or _checks.enabled()):
            return loss  # every output costs the host a microsecond
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *unused: Any):
        grad_logits = None
        if grad_output is not None:
            logits, grad, floats, ints, class_weight = ctx.saved_tensors
            # What is saved must survive, and what is handed out must be the caller's alone.
            if graph_is_kept() or torch.is_grad_enabled():
                holds_gradient = ctx.early and ctx.inplace

                def compute(grad_output, logits, floats, ints, class_weight):
                    if holds_gradient:
                        return logits * grad_output
                    return ctx.ops.backward(grad_output, logits, floats, ints, class_weight=class_weight, **ctx.maths)

                grad_logits = once("cross_entropy", compute, grad_output, logits, floats, ints, class_weight)
            elif ctx.early or ctx.inplace:
                grad_logits = grad if ctx.early else logits
                source = None if ctx.inplace else logits
                options = ctx.maths if class_weight is None else {"class_weight": class_weight, **ctx.maths}
                if not ctx.early:
                    options = {"holds_gradient": False, **options}
                try:
                    ctx.ops.backward_(grad_logits, grad_output, source, floats, ints, **options)
                except RuntimeError as error:
                    explain_batches("cross_entropy", error, (grad_output,))
                if ctx.inplace:
                    increment_version(logits)
            else:
                grad_logits = ctx.ops.backward(grad_output, logits, floats, ints, class_weight=class_weight, **ctx.maths)
        return grad_logits, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode("cross_entropy")


class CrossEntropyRule:
    """Cross entropy for the transforms of torch.func: what :class:`.op.Transformable` asks of an op."""

    name, results, picks = "cross_entropy", 1, True
    tensors = ("logits", "labels", "cu_seqlens", "num_items", "token_weight", "class_weight")
    no_gradients = (None,) * 5

    def __init__(self, ops: SimpleNamespace):
        self.ops = ops

    def raw(self, logits: Tensor, labels: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        *others, options, with_stats = tensors
        named = dict(zip(self.tensors[2:], others, strict=True))
        loss, _, *stats = self.ops.forward(logits, labels, **named, **dict(options), with_stats=with_stats)
        return loss, *stats

    def keep(self, ctx: Any, tensors: tuple, outputs: tuple) -> None:
        ctx.save_for_backward(tensors[0], *outputs[1:3], tensors[5])

    def once(self, grads: tuple, saved: tuple, options: tuple, needs: tuple[bool, ...]) -> tuple:
        maths = {name: value for name, value in options[0] if name in MATHS}

        def compute(grad_output: Tensor, logits: Tensor, floats: Tensor, ints: Tensor, class_weight: Tensor | None) -> Tensor:
            return self.ops.backward(grad_output, logits, floats, ints, class_weight=class_weight, **maths)

        return (once(self.name, compute, *grads, *saved),)


def gradient_like(logits: Tensor) -> Tensor:
    """What a fake kernel returns as the gradient: the native one's memory, csrc/torch/ops_ce_loss.cpp has the rule."""
    if logits.is_contiguous() or (rows_are_writable(logits) and is_dense(logits)):
        return torch.empty_like(logits)
    return logits.new_empty(logits.shape)


def loss_like(logits: Tensor, reduction: str) -> Tensor:
    """What a fake kernel returns as the loss."""
    return logits.new_empty(logits.shape[:-1] if reduction == "none" else (), dtype=maths_dtype(logits))


def stats_like(logits: Tensor, cu_seqlens: Tensor | None, with_stats: bool) -> tuple[Tensor, ...]:
    """What a fake kernel returns beside the loss."""
    batch = logits.shape[:-1]
    rows = math.prod(batch)  # torch.Size.numel() would make a number of rows a constant of the graph
    documents = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else math.prod(batch[:-1])
    dtype = maths_dtype(logits)
    floats = logits.new_empty((5 if with_stats else 4, rows), dtype=dtype)
    ints = logits.new_empty((2 if with_stats else 1, rows), dtype=torch.int32)
    counts = logits.new_empty((2 if with_stats else 0,), dtype=torch.int64)
    return floats, ints, counts, logits.new_empty((documents if with_stats else 0,), dtype=dtype)


def register(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    raw, fake = raw_ops(namespace), fakes(namespace)

    @fake("cross_entropy")
    def _(logits, labels, *, reduction="mean", **options):
        return loss_like(logits, reduction)

    @fake("cross_entropy_stats")
    def _(logits, labels, *, cu_seqlens=None, reduction="mean", **options):
        return loss_like(logits, reduction), *stats_like(logits, cu_seqlens, True)

    @fake("_cross_entropy_prepare")
    def _(vocab, labels, *, double_precision=False, **options):
        rows = labels.numel()
        scale = labels.new_empty((rows,), dtype=torch.float64 if double_precision else torch.float32)
        return labels.new_empty((rows,), dtype=torch.int32), scale, labels.new_empty((2,), dtype=torch.int64)

    @fake("_cross_entropy_forward")
    def _(logits, labels, *, cu_seqlens=None, reduction="mean", with_grad=False, with_stats=False, **options):
        grad = gradient_like(logits) if with_grad else logits.new_empty((0,))
        return loss_like(logits, reduction), grad, *stats_like(logits, cu_seqlens, with_stats)

    @fake("_cross_entropy_forward_")
    def _(logits, labels, *, cu_seqlens=None, reduction="mean", with_stats=False, **options):
        return loss_like(logits, reduction), *stats_like(logits, cu_seqlens, with_stats)

    @fake("_cross_entropy_backward")
    def _(grad_output, logits, floats, ints, **maths):
        return gradient_like(logits)

    @fake("_cross_entropy_backward_")
    def _(grad_logits, grad_output, logits, floats, ints, **options):
        return None

    never_cached(ops._cross_entropy_forward_.default, ops._cross_entropy_backward_.default)

    @fake("_cross_entropy_partial")
    def _(logits, labels, *, cu_seqlens=None, **options):
        floats, ints, *_ = stats_like(logits, cu_seqlens, False)
        return floats.new_empty((PARTIAL_STATES * math.prod(logits.shape[:-1]) + 2,)), floats, ints

    @fake("_cross_entropy_combine")
    def _(partials, logits, floats, ints, *, reduction="mean", **options):
        return loss_like(logits, reduction)

    def differentiable(op: Any, with_stats: bool):
        below = below_autograd(op)

        def autograd(logits, labels, **options):
            refuse_transforms("cross_entropy", f"torch.ops.{namespace} has no rules for them; packops.cross_entropy has")
            check_constants("cross_entropy", {name: options.get(name) for name in CONSTANTS})
            if is_differentiated(logits):
                outputs = CrossEntropyFunction.apply(logits, labels, (raw, options, with_stats, False))
                return outputs if with_stats or isinstance(outputs, Tensor) else outputs[0]
            return below(logits, labels, **options)

        return typed(autograd)

    kernels = library(namespace)
    kernels.impl("cross_entropy", differentiable(ops.cross_entropy.default, False), "Autograd")
    kernels.impl("cross_entropy_stats", differentiable(ops.cross_entropy_stats.default, True), "Autograd")


_OPS = raw_ops("packops")
_RULE = CrossEntropyRule(_OPS)
_KINDS = kinds_of(torch.ops.packops.cross_entropy.default)
_PLAIN_NAMES = ("ignore_index", "label_smoothing", "z_loss", "softcap", "logit_scale")


class CrossEntropyStats(NamedTuple):
    """What the loss kernel saw on its way; none of it is differentiable. ``T`` rows have the labels' shape."""

    num_tokens: Tensor  #: () int64: rows that counted
    num_sequences: Tensor  #: () int64: documents with at least one row that counted
    lse: Tensor  #: (...) log-sum-exp of the (scaled, capped) logits; 0 where ignored
    entropy: Tensor  #: (...) of the softmax, in nats; 0 where ignored
    prediction: Tensor  #: (...) int64 argmax, the first index on ties; -1 where ignored
    correct: Tensor  #: (...) bool: counted and prediction == label
    sequence_loss: Tensor  #: (documents,) mean loss of each document (its sum for "seq-mean-token-sum"); 0 if none counted


may_be_saved(CrossEntropyStats)


def as_num_items(op: str, num_items: Tensor | float | None) -> Tensor | None:
    """A number becomes a host tensor: the op reads it there, so it costs neither a copy to the device nor a wait for it."""
    if num_items is None or isinstance(num_items, Tensor):
        return num_items
    if isinstance(num_items, bool) or not isinstance(num_items, NUMBERS):
        raise TypeError(f"packops.{op}: num_items must be a number, a tensor of one element or None, got {describe(num_items)}")
    try:
        return torch.tensor(num_items, dtype=torch.float64, device="cpu")  # under torch.device("cuda"), too
    except OverflowError:
        raise ValueError(f"packops.{op}: num_items must be positive and finite, got an int that no float can hold") from None


class LossOptions(TypedDict, total=False):
    """The keyword arguments that all forms of the loss share."""

    cu_seqlens: Tensor | None
    shift: bool
    reduction: Reduction
    num_items: Tensor | float | None
    ignore_index: int
    token_weight: Tensor | None
    class_weight: Tensor | None
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float


class CrossEntropyOptions(LossOptions, total=False):
    """Those of :func:`cross_entropy`, for its overloads: ``return_stats`` alone decides what it returns."""

    inplace: bool


@overload
def cross_entropy(
    logits: Tensor, labels: Tensor, *, return_stats: Literal[False] = False, **options: Unpack[CrossEntropyOptions]
) -> Tensor: ...
@overload
def cross_entropy(
    logits: Tensor, labels: Tensor, *, return_stats: Literal[True], **options: Unpack[CrossEntropyOptions]
) -> tuple[Tensor, CrossEntropyStats]: ...
@overload
def cross_entropy(
    logits: Tensor, labels: Tensor, *, return_stats: bool, **options: Unpack[CrossEntropyOptions]
) -> Tensor | tuple[Tensor, CrossEntropyStats]: ...
def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    r"""Cross entropy that knows where packed documents end and by what its loss is divided.

    With :math:`x' = c \tanh(x s / c)` (``softcap`` c, ``logit_scale`` s) a row with target y loses

    .. math:: \ell = w \left[(1-\epsilon)\, u_y\,(\mathrm{lse} - x'_y)
              + \tfrac{\epsilon}{V} \sum_c u_c\,(\mathrm{lse} - x'_c) + z\,\mathrm{lse}^2\right]

    with ``token_weight`` w, ``class_weight`` u, ``label_smoothing`` ε (as torch defines them) and ``z_loss`` z. The maths is
    fp32 whatever the logits' dtype (fp64 for fp64), and so is the loss.

    Args:
        logits: (..., V) bf16, fp16 or fp32 (fp64 on the CPU); rows may be strided, the last dimension contiguous.
        labels: (...) int32 or int64.
        cu_seqlens: (S+1,) int32 or int64 on the logits' device: where each of S documents begins in the flattened rows, as
            attention kernels take it. Rows at or past ``cu_seqlens[-1]`` are padding and never count; empty documents are legal.
            Without it every row of a (..., L, V) batch is one document of length L.
        shift: False: row i is scored against ``labels[i]``. True: against ``labels[i+1]``, and the last row of every document
            against nothing. Labels already masked at the boundaries give the same result.
        reduction: ``"none"`` (per token, 0 where ignored), ``"sum"``, ``"mean"`` = Σ wℓ / Σ w over counted tokens,
            ``"seq-mean-token-mean"`` = mean over documents of the document's mean, ``"seq-mean-token-sum"`` = mean over
            documents of the document's sum. Documents without a counted token do not count.
        num_items: replaces the local denominator (tokens for "mean", documents for the two others) by a global count over
            micro-batches and ranks: a number, or a one-element tensor of any numeric dtype on the device or the host.
        ignore_index: this label does not count.
        token_weight: (...) float per token, or all in one row (T,). A token of weight 0 is not counted and its row is not read,
            as if its label were ``ignore_index``.
        class_weight: (V,) float per class.
        inplace: overwrite the logits with their gradient: O(rows) extra memory. The logits must not be a leaf. The gradient of a
            reduced loss is multiplied by ``grad_output`` where it stands: in bf16 that is a second rounding, unless
            ``grad_output`` is a power of two.
        return_stats: also return :class:`CrossEntropyStats`.

    Returns:
        The loss, fp32 (fp64 for fp64 logits): () or, for ``"none"``, the labels' shape. If nothing counts the loss is 0 and
        the gradient 0, where torch gives NaN. Differentiable once with respect to the logits, for any ``grad_output``.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; it is named.
        IndexError: a label outside [0, V) that is not ``ignore_index``, on the CPU. On CUDA that row's loss is NaN and its
            gradient 0, unless :func:`packops.checks` is on.
    """
    options: dict[str, Any] = {}  # those that are not at their defaults: handing one to the dispatcher costs half a microsecond
    if cu_seqlens is not None:
        options["cu_seqlens"] = cu_seqlens
    if shift is not False:
        options["shift"] = shift
    if reduction != "mean":
        options["reduction"] = reduction
    if num_items is not None:
        options["num_items"] = as_num_items("cross_entropy", num_items)
    if token_weight is not None:
        options["token_weight"] = token_weight
    if class_weight is not None:
        options["class_weight"] = class_weight
    maths = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    is_plain = all(map(operator.is_, maths, _PLAIN)) or (tuple(map(type, maths)) == _PLAIN_TYPES and maths == _PLAIN)
    if not is_plain:
        options.update(zip(_PLAIN_NAMES, maths, strict=True))
    if is_compiling():
        _check(logits, labels, options, inplace, return_stats)
        if not return_stats:
            return torch.ops.packops.cross_entropy(logits, labels, **options)
        loss, *state = torch.ops.packops.cross_entropy_stats(logits, labels, **options)
        return loss, stats_of(labels.shape, *state)
    try:
        known = is_plain and type(reduction) is str and type(shift) is type(inplace) is type(return_stats) is bool
        if not known:
            _check(logits, labels, options, inplace, return_stats)
        elif num_items is not None or token_weight is not None or class_weight is not None:
            check_constants("cross_entropy", {name: options.get(name) for name in CONSTANTS})
        if transforms_are_active():
            return _transformed(logits, labels, options, inplace, return_stats)
        if is_differentiated(logits):
            if inplace:
                check_may_overwrite(logits, "cross_entropy")
            outputs = CrossEntropyFunction.apply(logits, labels, (_OPS, options, return_stats, inplace))
            if isinstance(outputs, Tensor):
                return outputs
            loss, *state = outputs
        else:
            loss, _, *state = _OPS.forward(logits, labels, **options, with_stats=return_stats)
        if logits.is_cuda and _checks.enabled():
            _checks.raise_bad_rows(
                labels, cu_seqlens, state[1][TARGET], shift=shift, ignore_index=ignore_index, vocab=logits.shape[-1]
            )
    except Exception as error:
        explain(error, "cross_entropy", _KINDS, {"logits": logits, "labels": labels, **options}.items())
    return (loss, stats_of(labels.shape, *state)) if return_stats else loss


_PLAIN: tuple[Any, ...] = tuple((cross_entropy.__kwdefaults__ or {})[name] for name in _PLAIN_NAMES)
_PLAIN_TYPES = tuple(map(type, _PLAIN))


def _check(logits: Tensor, labels: Tensor, options: dict[str, Any], inplace: bool, return_stats: bool) -> None:
    """TypeError or ValueError for arguments that the dispatcher would misread."""
    check_types("cross_entropy", _KINDS, {"logits": logits, "labels": labels, **options}.items())
    flags = {"inplace": inplace, "return_stats": return_stats}
    check_types("cross_entropy", dict.fromkeys(flags, "bool"), flags.items())
    check_constants("cross_entropy", {name: options.get(name) for name in CONSTANTS})


def _transformed(logits: Tensor, labels: Tensor, options: dict[str, Any], inplace: bool, return_stats: bool) -> Any:
    """Under a transform of torch.func."""
    if inplace:
        raise RuntimeError("packops.cross_entropy: inplace=True does not work under torch.func's transforms: leave it out")
    tensors = [options.get(name) for name in CrossEntropyRule.tensors[2:]]
    rest = tuple((name, value) for name, value in options.items() if name not in CrossEntropyRule.tensors)
    loss, *state = Transformable.apply(_RULE, (rest, return_stats), logits, labels, *tensors)
    return (loss, stats_of(labels.shape, *state)) if return_stats else loss


def stats_of(shape: torch.Size, floats: Tensor, ints: Tensor, counts: Tensor, sequence_loss: Tensor) -> CrossEntropyStats:
    target, prediction = ints[TARGET], ints[PREDICTION]
    counted = target >= 0
    lse = torch.where(counted, floats[MAX] + floats[SUM].log(), 0.0)
    return CrossEntropyStats(
        num_tokens=counts[0],
        num_sequences=counts[1],
        lse=lse.view(shape),
        entropy=floats[ENTROPY].clone().view(shape),
        prediction=prediction.long().view(shape),
        correct=(counted & (prediction == target)).view(shape),
        sequence_loss=sequence_loss,
    )


class CrossEntropyLoss(nn.Module):
    """:func:`packops.cross_entropy` with its options fixed.

    Unlike :class:`torch.nn.CrossEntropyLoss` it takes the classes in the last dimension, and gives 0 where nothing counts.

    Args:
        class_weight: (V,) float per class: a buffer, so it moves with the module and is part of its state dict, as torch's is.
        shift, reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, inplace, return_stats: as in
            :func:`packops.cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: when it is called, as :func:`packops.cross_entropy`.

    >>> loss = CrossEntropyLoss(shift=True, reduction="seq-mean-token-mean")
    >>> loss(torch.randn(9, 50), torch.arange(9), cu_seqlens=torch.tensor([0, 7, 9])).shape
    torch.Size([])
    """

    class_weight: Tensor | None

    @checks_annotations
    def __init__(
        self,
        *,
        shift: bool = False,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        inplace: bool = False,
        return_stats: bool = False,
    ):
        super().__init__()
        self.register_buffer("class_weight", class_weight)
        self.shift = shift
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.inplace = inplace
        self.return_stats = return_stats

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        num_items: Tensor | float | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        """What changes from batch to batch: shapes and meaning as in :func:`packops.cross_entropy`."""
        return cross_entropy(
            logits,
            labels,
            cu_seqlens=cu_seqlens,
            shift=self.shift,
            reduction=self.reduction,
            num_items=num_items,
            ignore_index=self.ignore_index,
            token_weight=token_weight,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            inplace=self.inplace,
            return_stats=self.return_stats,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, shift={self.shift}, ignore_index={self.ignore_index}"
