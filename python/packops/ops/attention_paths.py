"""Attention within documents by what torch has, for heads and dtypes that the kernels of packops do not take.

``packops``  the kernels: fp16 and bf16 with head dimensions that are multiples of 8 up to 256 on CUDA, everything on the CPU.
``varlen``  ``torch.nn.attention.varlen.varlen_attn``, the FlashAttention-2 that comes with torch: builds without the kernels,
            and where it is faster, long documents and large heads on GPUs other than Hopper.
``flex``    FlexAttention, for a softcap on CUDA.
``sdpa``    ``scaled_dot_product_attention`` on one document after the other or on groups of about equal length: everything else,
            and attention sinks. Where documents share prefixes, a segment after the other, each with the keys of its path.
``masked``  the same with a mask, a stretch of queries at a time: graphs (``torch.compile``, CUDA graphs), in which nobody can
            read where documents begin.

:func:`choose_path` takes the fastest. :func:`packops.attention` takes its own kernel wherever that takes the heads.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import _C, has_cuda
from .arguments import checks_annotations
from .attention_documents import FLEX_BLOCK, Documents, look_up, some
from .attention_nan import Shield, Unshield
from .metadata import packed_metadata

Path = Literal["packops", "varlen", "flex", "sdpa", "masked"]

HALVES = (torch.float16, torch.bfloat16)
CONSTANTS = _C.constants()
HEAD_DIM_STEP: int = CONSTANTS["attention_head_dim_step"]
MOST_HEAD_DIM: int = CONSTANTS["attention_most_head_dim"]
LEAST_CAPABILITY = (8, 0)
# What FlexAttention was seen to take.
FLEX_HEAD_DIMS = range(16, 257)
# Without Hopper's products by warp groups it is faster than FlashAttention-2 with heads of at most so many features and documents
# up to about this length.
BY_WARPS = {"head_dim": 128, "longest": 2048}

# On the CPU a call per document is the fastest way from about this mean length on; below it, calls cost more than arithmetic.
CALL_PER_DOCUMENT = 24
# Query rows at a time where the scores are materialised.
SCORE_ROWS = 512
# Multiplications of a product from which a call per segment is faster on the CPU than the kernel, which is plain code.
CALL_PER_SEGMENT = 2**17


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of a query's scores within its document, before they weigh the values.

    Attributes:
        causal: no token sees a later one.
        window: a token sees itself and the ``window - 1`` tokens before it; None: all before it.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        scaling: of the products of queries and keys; None: ``head_dim ** -0.5``.
        dropout: probability.
        sinks: (heads,) a further score of every query, whose share of the weights goes to nothing (GPT-OSS).
    """

    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scaling: float | None = None
    dropout: float = 0.0
    sinks: Tensor | None = None

    @property
    def shapes_scores(self) -> bool:
        """Whether something happens to the scores that torch's ``scaled_dot_product_attention`` does not do."""
        return self.softcap is not None or self.sinks is not None

    @property
    def options(self) -> Any:
        """Of :func:`packops.attention`, save ``causal``."""
        return {"window": self.window, "softcap": self.softcap, "scale": self.scaling}


def kernel_takes(device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int]) -> bool:
    """Whether the kernel of packops on CUDA takes heads of so many features, of queries and keys, and of values."""
    dim = head_dims[0]
    fits = has_cuda and dtype in HALVES and dim == head_dims[1] and 0 < dim <= MOST_HEAD_DIM and dim % HEAD_DIM_STEP == 0
    return fits and (is_compiling() or runs_kernels(device))


@functools.cache
def runs_kernels(device: torch.device) -> bool:
    """Whether a GPU has the instructions of the kernels. Fake tensors may name one that is not there: yes."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


@checks_annotations
def max_docs_for_flash_attention(total_tokens: int, num_heads: int, head_dim: int) -> int:
    """Most documents a packed row may have before FlashAttention-2's variable-length backward overflows 32 bits.

    It needs ``(total_tokens + 128 * documents) * num_heads * head_dim < 2^31``, head_dim rounded up to a multiple of 32; beyond
    that it writes out of bounds. Pass the result to :func:`packops.pack` as ``max_docs_per_pack``.
    """
    if num_heads < 1 or head_dim < 1:
        raise ValueError(
            f"packops.max_docs_for_flash_attention: num_heads and head_dim must be positive, got {num_heads} and {head_dim}"
        )
    return _most_documents(total_tokens, num_heads, head_dim)


def _most_documents(total_tokens: int, num_heads: int, head_dim: int) -> int:
    per_token = num_heads * (-(-head_dim // 32) * 32)
    return max(0, ((2**31 - 1) // per_token - total_tokens) // 128)


def choose_path(
    device: torch.device,
    dtype: torch.dtype,
    rule: Rule,
    *,
    heads: int,
    head_dims: tuple[int, int],
    total: int,
    count: int,
    longest: int,
    parameters: frozenset[str] | None = None,
    capability: tuple[int, int] | None = None,
) -> Path:
    """How ``count`` documents of ``total`` tokens, none longer than ``longest``, are best attended to.

    Args:
        head_dims: of queries and keys, and of values.
        parameters: what this torch's ``varlen_attn`` takes (torch 2.10 has no window); empty if there is none.
        capability: of the device.
    """
    if device.type != "cuda" or rule.sinks is not None:
        return "sdpa"
    if capability is None:
        capability = torch.cuda.get_device_capability(device)
    has_flash = dtype in HALVES and capability >= LEAST_CAPABILITY and head_dims[0] == head_dims[1] and rule.dropout == 0
    if has_flash and kernel_takes(device, dtype, head_dims):
        by_warps = head_dims[0] <= BY_WARPS["head_dim"] and longest <= BY_WARPS["longest"]
        if capability == (9, 0) or by_warps or rule.softcap is not None:
            return "packops"
    if rule.softcap is not None:
        takes = rule.causal and dtype != torch.float64 and all(x in FLEX_HEAD_DIMS for x in head_dims)
        return "flex" if takes and rule.dropout == 0 else "sdpa"
    if parameters is None:
        parameters = varlen_parameters()
    can = (
        has_flash
        and head_dims[0] <= 256
        and head_dims[0] % 8 == 0
        and "cu_seq_q" in parameters
        and (rule.window is None or "window_size" in parameters)
        and (rule.scaling in (None, head_dims[0] ** -0.5) or "scale" in parameters)
        and count <= _most_documents(total, heads, head_dims[0])
    )
    return "varlen" if can else "sdpa"


@functools.cache
def varlen_parameters() -> frozenset[str]:
    """Parameters of ``torch.nn.attention.varlen.varlen_attn``; empty where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


# ---- (T, heads, head_dim) -> (T, heads, head_dim) ---------------------------------------------------------------------------


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents, rule: Rule) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    parameters = varlen_parameters()
    options: dict[str, Any] = {}
    if "window_size" in parameters:  # on the left, a window of n is n - 1 tokens before the token itself
        options["window_size"] = (-1 if rule.window is None else rule.window - 1, 0) if rule.causal else (-1, -1)
    else:
        options["is_causal"] = rule.causal
    if "scale" in parameters:
        options["scale"] = rule.scaling
    if "enable_gqa" in parameters:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    bounds, longest = documents.cu_seqlens, documents.max_seqlen
    return cast(Tensor, varlen_attn(q, k, v, bounds, bounds, longest, longest, **options))


def attend_flex(q: Tensor, k: Tensor, v: Tensor, documents: Documents, rule: Rule) -> Tensor:
    softcap = rule.softcap

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    output = _flex_attention(q.is_cuda)(
        q,
        k,
        v,
        score_mod=None if softcap is None else capped,
        block_mask=documents.block_mask(rule.window),
        scale=rule.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return cast(Tensor, output[0].transpose(0, 1))


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import FlexKernelOptions, flex_attention

    if not compiled:
        return flex_attention
    # Below 128 tokens torch would choose its decoding kernel, which for some head counts has no configuration (torch 2.11).
    has_backends = "BACKEND" in FlexKernelOptions.__annotations__
    options = {"BACKEND": "TRITON"} if has_backends else {"FORCE_USE_FLEX_ATTENTION": True}
    return functools.partial(torch.compile(flex_attention), kernel_options=options)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents, rule: Rule) -> Tensor:
    if documents.parents is not None:
        return _attend_paths(q, k, v, documents.paths, rule)
    lengths = documents.lengths
    if not lengths:
        return _zeros(q, k, v)
    if not rule.causal or (q.is_cpu and documents.total >= CALL_PER_DOCUMENT * len(lengths)):
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([_document(a, b, c, rule) for a, b, c in parts], dim=2)[0].transpose(0, 1)
    grids, place = documents.groups
    outputs = []
    for rows, count in grids:
        # a shorter document's row ends in copies of its last token, which come after all of its own
        a, b, c = (x.index_select(0, rows).unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
        outputs.append(_document(a, b, c, rule).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, place)


def _attend_paths(q: Tensor, k: Tensor, v: Tensor, paths: list[list[slice]], rule: Rule) -> Tensor:
    if not paths:
        return _zeros(q, k, v)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))

    def along(x: Tensor, path: list[slice]) -> Tensor:
        return torch.cat([x[:, :, tokens] for tokens in path], dim=2)

    outputs = [_document(q[:, :, path[-1]], along(k, path), along(v, path), rule) for path in paths]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, rule: Rule, *, is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=rule.dropout,
        is_causal=is_causal,
        scale=rule.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _document(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Attention of documents (N, heads, L, head_dim), a stretch of queries at a time where it needs a mask.

    Queries may be fewer than keys: those of the last tokens.
    """
    length = k.shape[2]
    before = length - q.shape[2]
    window = rule.window if rule.window is not None and rule.window < length else None
    if window is None and not rule.shapes_scores and before == 0:
        return _sdpa(q, k, v, rule, is_causal=rule.causal)
    rows = SCORE_ROWS if window is None else max(window, FLEX_BLOCK)
    outputs = []
    for begin, part in zip(range(before, length, rows), q.split(rows, dim=2), strict=True):
        end = begin + part.shape[2] if rule.causal else length
        first = 0 if window is None else max(0, begin - window + 1)
        query, key = torch.arange(begin, begin + part.shape[2], device=q.device), torch.arange(first, end, device=q.device)
        query = query[:, None]
        mask = key <= query if rule.causal else (key >= 0).expand(len(query), -1)
        if window is not None:
            mask &= key > query - window
        outputs.append(_masked(part, k[:, :, first:end], v[:, :, first:end], rule, mask))
    return torch.cat(outputs, dim=2)


def _masked(q: Tensor, k: Tensor, v: Tensor, rule: Rule, mask: Tensor) -> Tensor:
    return shaped_attention(q, k, v, rule, mask=mask) if rule.shapes_scores else _sdpa(q, k, v, rule, mask=mask)


def shaped_attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule, *, mask: Tensor) -> Tensor:
    """Attention with a softcap or sinks, and a mask that is True where a query sees a key; scores are there, at least in fp32."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2)
    scale = q.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if rule.sinks is not None:
        sinks = rule.sinks.to(scores.dtype).view(k.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (F.dropout(weights, rule.dropout).to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, parents: Tensor | None, rule: Rule) -> Tensor:
    """Attention of documents, or of segments that continue others, with nothing read on the host. The padding's rows are 0."""
    total = q.shape[0]
    if total == 0:
        return _zeros(q, k, v)
    metadata: tuple[Tensor, ...] = packed_metadata(cu_seqlens, total, parents)
    position, document = metadata[:2]
    padding = (document < 0)[:, None, None]
    q, k, v = (x.masked_fill(padding, 0).transpose(0, 1)[None] for x in (q, k, v))
    q, k, v, bad_queries, bad_keys = Shield.apply(q, k, v)
    row = torch.arange(total, device=q.device)
    outputs = []
    size = total if is_compiling() else SCORE_ROWS  # a graph of any length has no loop
    for begin, part in enumerate(q.split(size, dim=2)):
        queries = slice(begin * size, begin * size + part.shape[2])
        keys = slice(queries.stop if rule.causal else total)
        query, key = row[queries, None], row[keys]
        if parents is None:
            sees = document[queries, None] == document[keys]
            if rule.causal:
                sees &= key <= query
        else:
            sees = (key <= query) & (query < metadata[2][keys])
        if rule.window is not None:
            sees &= position[queries, None] - position[keys] < rule.window
        sees |= key == query  # so that padding sees something
        output = _masked(part, k[:, :, keys], v[:, :, keys], rule, sees)
        outputs.append(Unshield.apply(output, bad_queries[queries], bad_keys[keys], sees))
    return torch.cat(outputs, dim=2)[0].transpose(0, 1).masked_fill(padding, 0)


def attend_forest_on_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, parents: Tensor, rule: Rule) -> Tensor:
    """Documents that share prefixes, by the kernel on the CPU, which is plain code, or a call per segment: what is faster."""
    has_kernel = q.shape[2] == v.shape[2]
    if in_graph(cu_seqlens):
        slow = False
    else:
        forest = read_forest(cu_seqlens, parents, q.shape[0])
        slow = forest.pairs * q.shape[1] * q.shape[2] >= CALL_PER_SEGMENT * len(forest.paths)
    if slow or not has_kernel:
        return attend(q, k, v, cu_seqlens, parents, rule)
    import packops

    return packops.attention(q, k, v, cu_seqlens, parents, **rule.options)


def _zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The result where there are no documents, with gradients of 0."""
    return v.new_zeros(*q.shape[:2], v.shape[2]) + sum(x[:0].sum() for x in (q, k, v))


ATTEND: dict[Path, Callable[..., Tensor]] = {"varlen": attend_varlen, "flex": attend_flex, "sdpa": attend_sdpa}


# ---- what packops.attention takes where its kernel does not take the heads --------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, parents: Tensor | None, rule: Rule) -> Tensor:
    """:func:`packops.attention` by what torch has. Where it must know the boundaries, it waits for the device, once per
    ``cu_seqlens``: all layers of a model that pass the same tensor wait once."""
    check(q, k, v, cu_seqlens, parents, rule)
    path = path_of(q, v, cu_seqlens, parents, rule)
    if path == "masked":
        return attend_masked(q, k, v, cu_seqlens, parents, rule).contiguous()
    total = q.shape[0]
    if in_graph(cu_seqlens):
        padding = (torch.arange(total, device=q.device) >= cu_seqlens[-1])[:, None, None]
        q, k, v = (x.masked_fill(padding, 0) for x in (q, k, v))
        # nobody sees whether they rise: no address outside the tensors all the same. The padding is the last document.
        bounds = F.pad(cu_seqlens.clamp(0, total).cummax(0).values.int(), (0, 1), value=total)
        return ATTEND[path](q, k, v, Documents(bounds, total, total), rule).masked_fill(padding, 0).contiguous()
    if parents is None:
        documents = look_up(cu_seqlens, lambda: read_documents(cu_seqlens, total), "attention", total)
    else:
        documents = read_forest(cu_seqlens, parents, total)
    count = documents.total
    if count == 0:
        return _zeros(q, k, v)
    output = ATTEND[path](q[:count], k[:count], v[:count], documents, rule)
    return F.pad(output, (0, 0, 0, 0, 0, total - count)).contiguous()


def path_of(q: Tensor, v: Tensor, cu_seqlens: Tensor, parents: Tensor | None, rule: Rule) -> Path:
    """Which of torch's ways it is, without a host sync."""
    if parents is not None:
        return "masked" if in_graph(cu_seqlens) else "sdpa"
    path = choose_path(
        q.device,
        q.dtype,
        rule,
        heads=q.shape[1],
        head_dims=(q.shape[2], v.shape[2]),
        total=q.shape[0],
        count=cu_seqlens.shape[0],  # one more than there are: the padding
        longest=q.shape[0],
    )
    return "masked" if path == "sdpa" and in_graph(cu_seqlens) else path


def in_graph(cu_seqlens: Tensor) -> bool:
    """Whether boundaries cannot be read on the host: compiled, with fake tensors, or while a CUDA graph is captured."""
    if is_compiling() or type(cu_seqlens) is not Tensor:
        return True
    return cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()


def read_documents(cu_seqlens: Tensor, total: int) -> Documents:
    """The documents, without the padding. Waits for the device."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > total or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"packops.attention: cu_seqlens must rise from 0 to at most the {total} tokens of q, got {some(bounds)}")
    longest = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
    return Documents(cu_seqlens.detach().to(torch.int32, copy=True), longest, bounds[-1])


def read_forest(cu_seqlens: Tensor, parents: Tensor, total: int) -> Documents:
    """The segments of documents that share prefixes, without the padding. Waits for the device, once per pair of tensors."""

    def read() -> Documents:
        bounds = cu_seqlens.detach().to("cpu", torch.int32, copy=True)
        packed_metadata(bounds, total, parents.cpu())  # raises where either is malformed
        return Documents(bounds, total, int(bounds[-1]), parents)

    if parents.is_inference():
        return read()
    # What is found holds the parents, so that no other tensor has their id meanwhile.
    return look_up(cu_seqlens, read, "forest", total, id(parents), parents._version)


def check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, parents: Tensor | None, rule: Rule) -> None:
    """TypeError or ValueError for what the op would refuse, save head dimensions and dtypes."""

    def want(right: bool, error: type[Exception], message: str) -> None:
        if not right:
            raise error(f"packops.attention: {message}")

    shape: tuple[int, ...] = tuple(q.shape)
    want(q.dim() == 3 and shape[2] > 0, ValueError, f"q must have shape (tokens, heads, head_dim), got {shape}")
    dtypes = (torch.float32, torch.float64, *HALVES)
    want(q.dtype in dtypes, TypeError, f"q must be float32, float16, bfloat16 or float64, got {q.dtype}")
    fits = k.dim() == 3 and k.shape[0] == shape[0] and k.shape[2] == shape[2] and k.shape[1] > 0 and shape[1] % k.shape[1] == 0
    heads = "k must have the shape of q except for heads, whose number divides that of q"
    want(fits, ValueError, f"{heads}, {shape}, got {tuple(k.shape)}")
    fits = v.dim() == 3 and v.shape[:2] == k.shape[:2] and v.shape[2] > 0
    want(fits, ValueError, f"v must have the tokens and heads of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        want(x.dtype == q.dtype, TypeError, f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        want(x.device == q.device, ValueError, f"{name} must be on the device of q, {q.device}, got {x.device}")
    count = cu_seqlens.shape[0] - 1 if cu_seqlens.dim() else 0
    for name, indices, right in (("cu_seqlens", cu_seqlens, "(documents + 1,)"), ("parents", parents, f"({count},)")):
        if indices is None:
            continue
        where, dtype, shape = indices.device, indices.dtype, tuple(indices.shape)
        want(where == q.device, ValueError, f"{name} must be on the device of q, {q.device}, got {where}")
        want(dtype in (torch.int32, torch.int64), TypeError, f"{name} must be int32 or int64, got {dtype}")
        fits = shape == (count,) if name == "parents" else len(shape) == 1 and shape[0] > 0
        want(fits, ValueError, f"{name} must have shape {right}, got {shape}")
    want(parents is None or rule.causal, ValueError, "parents needs causal: what continues a prefix comes after it")
    fits = rule.window is None or (rule.window >= 1 and rule.causal)
    want(fits, ValueError, f"window must be at least 1, and needs causal, got {rule.window}")
    for name, number in (("softcap", rule.softcap), ("scale", rule.scaling)):
        want(number is None or 2**-126 <= number < 2.0**128, ValueError, f"{name} must be positive and finite, got {number}")
