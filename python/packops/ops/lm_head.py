"""The lm_head, a chunk of rows at a time: how many rows, their logits, and the products of their gradient.

What ``linear_cross_entropy`` and ``linear_log_probs`` have in common. On Hopper two of the products are packops' own
(csrc/lm_head.h, :class:`Product`): that of the logits, which need not exist at all, since its epilogue turns them into what is
wanted while they are in registers, and that of the weight's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .scaled_rows import scaled_rows_

IGNORED: int = _C.constants()["ignored"]  # classes are not negative, so target < 0 is a row without a gradient

LOGITS_SHARE = 0.35  # of the memory that all logits would take
MIN_ROWS = 1024  # below, a product of a chunk is bound by reading and writing the (V, H) matrices, not by the matrix units
MAX_ROWS = 4096  # above, a larger chunk saves a few percent at most
COLUMN_MULTIPLE = 64  # of the tiles of matrix products
MAX_COLUMNS = 32768  # of a block of the vocabulary; half as many cost 1 to 2 %
UNSPLIT = 1 << 23  # elements of a result, two waves of tiles, above which no product adds up parts that it has rounded to 16 bits
TILE_COLUMNS = 768  # whole tiles of 192 columns, as csrc/lm_head.h has them, and of 256, as others do
CPU_BLOCKS = 32  # pieces of the vocabulary in which the CPU widens 16-bit operands


def choose_chunk_tokens(tokens: int, hidden_size: int, vocab: int, *, num_valid: int | None = None, copies: int = 1) -> int:
    """Rows of a chunk: all, where they fit, or else a power of two.

    A chunk of c rows takes ``c (V + H)`` elements of the hidden states' dtype: its logits, which become their own gradient, and a
    copy of its hidden rows without what does not count; ``c (copies V + H)`` where the logits are wider than that. Compacted rows
    (``num_valid``) take another c H in fp32. This may be ``LOGITS_SHARE`` of the memory of all logits, but always
    ``MIN_ROWS`` rows and never more than ``MAX_ROWS``. (Below ``MIN_ROWS / LOGITS_SHARE`` tokens, about 2900, ``MIN_ROWS``
    decides and the share is larger.)

    A power of two, because a chunk's gradient of the hidden states has few tiles, about ``(c / 128) (H / 256)``: where these do
    not come out even over the multiprocessors, most of the device waits for the last ones. A last chunk that is shorter lacks
    work as it lacks rows, so chunks of even size would gain nothing. docs/design.md has the figures.

    Not in this: the gradients and their accumulators, ``4 V H`` bytes for the weight and ``4 T H`` for the hidden states (half
    with ``accum_dtype=torch.bfloat16``; where the parameters are fp32 the accumulators become the gradients).
    """
    rows = tokens if num_valid is None else num_valid
    row = copies * vocab + hidden_size + (0 if num_valid is None else 2 * hidden_size)
    most = min(max(int(LOGITS_SHARE * tokens * vocab / max(row, 1)), MIN_ROWS), MAX_ROWS)
    return max(rows, 1) if rows <= most else 1 << (most.bit_length() - 1)


class Wanted(NamedTuple):
    """Which gradients to make."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


def accumulator_dtype(dtype: torch.dtype, accum_dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else accum_dtype or torch.float32


def wanted_of(given: dict[str, Any]) -> Wanted:
    return Wanted(*(given.get(f"grad_{name}", False) for name in Wanted._fields))


def rows_to_score(target: Tensor, num_valid: int | None) -> slice | Tensor:
    """All rows or, with ``num_valid``, the numbers of those that count and some more."""
    tokens = target.shape[0]
    if num_valid is None or num_valid >= tokens:
        return slice(0, tokens)
    # The rows that count come first; the rest is never touched.
    return (target == IGNORED).to(torch.uint8).argsort(stable=True)[:num_valid]


def row_chunks(target: Tensor, num_valid: int | None, chunk_tokens: int) -> Iterator[slice | Tensor]:
    """Which rows each chunk has."""
    rows = rows_to_score(target, num_valid)
    if isinstance(rows, slice):
        for begin in range(0, rows.stop, chunk_tokens):
            yield slice(begin, min(begin + chunk_tokens, rows.stop))
    else:
        yield from rows.split(chunk_tokens)


def take(x: Tensor, rows: slice | Tensor) -> Tensor:
    """These rows of a vector or a matrix; a view for a slice."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def hidden_rows(hidden: Tensor, target: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and targets of a chunk. A row without a gradient may hold anything, and 0 * NaN in the weight's gradient
    would be NaN: it becomes 0."""
    y = take(target, rows)
    index = None if isinstance(rows, slice) else rows
    x = hidden[rows] if isinstance(rows, slice) else hidden
    return scaled_rows_(hidden.new_empty((len(y), hidden.shape[1])), x, index=index, target=y), y


def logits_buffer(hidden: Tensor, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Memory for the logits of a chunk. Rows of an odd vocabulary would begin anywhere; here they begin where vector loads and
    products want them."""
    width = vocab if vocab % 8 == 0 else -(-vocab // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    buffer = hidden.new_empty((rows, width), dtype=dtype)
    buffer[:, vocab:].zero_()  # products read whole vectors
    return buffer[:, :vocab]


def make_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, product: Product | None = None) -> None:
    """out = hidden @ weight.T + bias, in the dtype of ``out``: that of the operands or, for 16-bit operands, fp32.

    product: takes the place of torch's where ``out`` has the operands' dtype.
    """
    if product is not None and out.dtype == hidden.dtype:
        product.logits_(out, hidden, weight, bias)
        return
    if out.dtype == hidden.dtype:
        if bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)
        return
    if hidden.is_cuda:
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), out.dtype, out=out)
    else:  # whose products cannot write a wider dtype than they read: a block of the vocabulary at a time
        hidden = hidden.to(out.dtype)
        columns = -(-weight.shape[0] // CPU_BLOCKS)
        for block, rows in zip(out.split(columns, dim=1), weight.split(columns), strict=True):
            torch.mm(hidden, rows.to(out.dtype).t(), out=block)
    if bias is not None:
        out += bias


def multiply(
    grad_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    first: bool,
    product: Product | None = None,
) -> None:
    """grad_hidden = grad_logits @ weight, grad_weight += grad_logits.T @ hidden, grad_bias += grad_logits.sum(0); at `first`, the
    weight's is set. product: takes the place of torch's where it can."""
    made = next((g for g in (grad_hidden, grad_weight, grad_bias) if g is not None), None)
    if made is None:
        return
    if not len(weight):  # a shard without classes
        if grad_hidden is not None:
            grad_hidden.zero_()
        return
    wide = made.dtype
    if not hidden.is_cuda and not wide == hidden.dtype == grad_logits.dtype:  # whose products have one dtype
        hidden = hidden.to(wide)
        for block in column_blocks(weight.shape[0], -(-weight.shape[0] // CPU_BLOCKS)):
            g = grad_logits[:, block].to(wide)
            if grad_hidden is not None:
                product_(grad_hidden, g, weight[block].to(wide), add=block.start > 0)
            if grad_weight is not None:
                product_(grad_weight[block], g.t(), hidden, add=not first)
            if grad_bias is not None:
                grad_bias[block] += g.sum(0)
        return
    if grad_hidden is not None:
        product_(grad_hidden, grad_logits, weight, add=False)
    if grad_weight is not None:
        of_weight = (grad_weight, grad_logits, hidden, None, not first)
        if product is None or not product.weight_gradient_(*of_weight):
            product_(grad_weight, grad_logits.t(), hidden, add=not first)
    if grad_bias is not None:
        grad_bias += grad_logits.sum(0, dtype=wide)


def product_(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out (+)= a @ b, accumulated in the dtype of `out` by the product itself; on the CPU all three have one dtype."""
    if out.dtype == a.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def column_blocks(vocab: int, columns: int) -> Iterator[slice]:
    """The vocabulary, so many columns at a time."""
    for begin in range(0, vocab, columns):
        yield slice(begin, min(begin + columns, vocab))


def choose_block_columns(vocab: int, *, copies: int = 1) -> int:
    """Columns of a block, where the logits of all rows are made a block of the vocabulary at a time: all, or a multiple of what
    the tiles of products have in common. Rows do not matter, so a row's results do not depend on how many there are.

    A block takes ``copies rows columns`` elements. This may be ``LOGITS_SHARE`` of the memory of all logits, but always
    ``MIN_ROWS`` columns, and never more than ``MAX_COLUMNS``. Over blocks only the gradient of the hidden states is accumulated,
    4 T H bytes; over chunks of rows it would be that of the weight, 4 V H bytes, which every chunk reads and writes.
    """
    most = min(max(int(LOGITS_SHARE * vocab / copies), MIN_ROWS), MAX_COLUMNS)
    if vocab <= most:
        return vocab
    blocks = -(-vocab // (most // TILE_COLUMNS * TILE_COLUMNS))  # of even size
    return -(-vocab // (blocks * TILE_COLUMNS)) * TILE_COLUMNS


def weight_gradient_(
    out: Tensor, grad_logits: Tensor, hidden: Tensor, factor: Tensor | None, add: bool, product: Product | None = None
) -> None:
    """out (+)= factor * grad_logits.T @ hidden: rows of the weight's gradient, accumulated in fp32 (fp64) and rounded once.

    factor: a 0-d tensor, or None: 1. On the CPU the operands are in the accumulator's dtype. product: takes the place of torch's
    where it can.
    """
    if product is not None and product.weight_gradient_(out, grad_logits, hidden, factor, add):
        return
    wide = accumulator_dtype(hidden.dtype, torch.float32)
    large = hidden.is_cuda and not add and out.numel() >= UNSPLIT
    if factor is None and (out.dtype == wide or large):
        product_(out, grad_logits.t(), hidden, add)
        return
    made = torch.empty_like(out, dtype=wide)
    product_(made, grad_logits.t(), hidden, add=False)
    scaled_rows_(out, made, factor, add=add)


def unit_of(largest: Tensor) -> Tensor:
    """What fp16 gradients are measured in: the largest is about 2^8 units, far from both of fp16's ends. A power of two, so that
    it rounds nothing, and not subnormal, since gradients are divided by it."""
    return torch.ldexp(torch.ones_like(largest), (torch.frexp(largest).exponent - 8).clamp(min=-126))


def check_main_grad(op: str, main_grad: Tensor | None, weight: Tensor, dtype: torch.dtype) -> None:
    """TypeError or ValueError for memory that the gradient of ``weight`` cannot be added to. dtype: of the operands."""
    if main_grad is None:
        return
    wide = accumulator_dtype(dtype, torch.float32)
    if main_grad.dtype != wide:
        raise TypeError(f"packops.{op}: main_grad must be {wide} for operands of {dtype}, got {main_grad.dtype}")
    if main_grad.shape != weight.shape or not main_grad.is_contiguous():
        raise ValueError(
            f"packops.{op}: main_grad must be contiguous and of weight's shape {tuple(weight.shape)}, got shape "
            f"{tuple(main_grad.shape)} and strides {tuple(main_grad.stride())}"
        )
    if main_grad.device != weight.device:
        raise ValueError(f"packops.{op}: main_grad must be on weight's device {weight.device}, got {main_grad.device}")
    if main_grad.requires_grad:
        raise ValueError(f"packops.{op}: main_grad is memory that a gradient is added to, but it needs a gradient itself")
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(f"packops.{op}: main_grad is given, but weight needs no gradient")


def stand_in(weight: Tensor | None) -> Tensor | None:
    """What autograd gets for a weight whose gradient went to ``main_grad``: None, or what Megatron's hooks look for. Where a
    parameter has ``grad_added_to_main_grad``, they want a gradient, which they drop unread, and this attribute set."""
    if weight is None:
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight)


def finish(grad: Tensor, factor: Tensor | None, dtype: torch.dtype, keep: bool) -> Tensor:
    """`grad` times `factor`, one number or one for each row, in `dtype`, rounded once. keep: `grad` may not be overwritten."""
    if factor is None:
        return grad.to(dtype)
    return scaled_rows_(grad if grad.dtype == dtype and not keep else torch.empty_like(grad, dtype=dtype), grad, factor)


class Product:
    """The handwritten products, where the device, its code, dtypes and layouts allow them."""

    ROWS = 8192  #: of a chunk of which only statistics are kept, 12 bytes for every 192 columns

    def __init__(self, namespace: str):
        ops = getattr(torch.ops, namespace)
        self._fits = ops._lm_head_fits.default
        self.logits_ = ops._lm_head_logits_.default
        self.statistics = ops._lm_head_statistics.default
        self.gradient_ = ops._lm_head_gradient_.default
        self._weight_gradient_fits = ops._lm_head_weight_gradient_fits.default
        self._weight_gradient_ = ops._lm_head_weight_gradient_.default

    def fits(self, hidden: Tensor, weight: Tensor) -> bool:
        if not hidden.is_cuda or hidden.dtype not in (torch.bfloat16, torch.float16):
            return False
        return len(weight) > 0 and self._fits(hidden, weight)  # a shard may hold no classes

    def weight_gradient_(self, out: Tensor, grad_logits: Tensor, hidden: Tensor, factor: Tensor | None, add: bool) -> bool:
        """out (+)= factor * grad_logits.T @ hidden, added to in fp32 only. False: not this one's, and nothing is done."""
        fits = hidden.is_cuda and not (add and out.dtype != torch.float32)
        if not fits or not self._weight_gradient_fits(out, grad_logits, hidden):
            return False
        self._weight_gradient_(out, grad_logits, hidden, factor, add)
        return True
