"""Attention in which documents never see each other, as a backend of transformers: ``packops_varlen``.

    packops.hf.attention.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="packops_varlen")
    model(**packops.PackingCollator(names="hf")(documents))

Three ways to compute it, chosen by :func:`choose_path`, none with a mask of tokens x tokens:

``varlen``  ``torch.nn.attention.varlen.varlen_attn``, the FlashAttention-2 that comes with torch: CUDA, fp16 and bf16.
``flex``    FlexAttention, for a softcap on CUDA.
``sdpa``    ``scaled_dot_product_attention`` on one document after the other or on groups of about equal length: everything else,
            the CPU first of all.

transformers' own backends find the documents of a packed row only where there is neither a mask nor a cache, and
``use_cache=True`` is the default; two of them disagree about where a document begins. Here the boundaries come from
``cu_seq_lens_q``, or else from ``position_ids``, whatever else is passed; where neither says, the call is refused.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..collator import max_docs_for_flash_attention
from ..functional import packed_metadata

NAME = "packops_varlen"
Path = Literal["varlen", "flex", "sdpa"]

# On the CPU a call per document is the fastest way from about this mean length on; below it, calls cost more than arithmetic.
CALL_PER_DOCUMENT = 24
# Documents of one group are at least this share of its longest: what is computed for nothing stays below a third.
GROUP_SHARE = 0.75
# Query rows at a time where the scores are materialised.
SCORE_ROWS = 512
FLEX_BLOCK = 128

UNSAID = -1  # the layer did not pass its window at all

# transformers builds masks from these functions; one that is not here would change who sees whom.
KNOWN_MASKS = frozenset(
    {
        "causal_mask_function",
        "bidirectional_mask_function",
        "and_masks.<locals>.and_mask",
        "sliding_window_overlay.<locals>.inner_mask",
        "packed_sequence_mask_function.<locals>.inner_mask",
        "remap_positions_for_packed_sequence.<locals>.inner_mask",
    }
)


def register() -> str:
    """Make ``attn_implementation="packops_varlen"`` known to transformers; returns the name. May be called again.

    Also works for a model that exists already: ``model.set_attn_implementation(packops.hf.attention.register())``.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ModuleNotFoundError("packops.hf needs transformers >= 5: pip install 'packops[hf]'") from error
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
    return NAME


# ---- who sees whom ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pattern:
    """What transformers asked its mask to say, in place of a mask.

    Attributes:
        causal: no token sees a later one.
        window: a token sees itself and the ``window - 1`` tokens before it; None: all before it.
        padding: (B, S) bool, False where there is padding; None: nowhere.
    """

    causal: bool = True
    window: int | None = None
    padding: Tensor | None = None


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Pattern | Tensor | None:
    """The mask function of the backend: transformers calls it once in a forward, for each kind of layer.

    With tokens in a cache (generation) there is nothing packed, and it is the mask of transformers' sdpa. Under ``torch.compile``
    it is None, and what the layer says of its window holds.

    Raises:
        NotImplementedError: the model wants another pattern than causal, windowed or bidirectional attention.
    """
    if kv_length != q_length:
        from transformers.masking_utils import sdpa_mask

        options["allow_is_causal_skip"] = options["allow_is_bidirectional_skip"] = False
        return cast(
            "Tensor | None",
            sdpa_mask(
                batch_size,
                q_length,
                kv_length,
                q_offset,
                kv_offset,
                mask_function=mask_function,
                attention_mask=attention_mask,
                **options,
            ),
        )
    if torch.compiler.is_compiling():  # the functions cannot be looked into: packed_attention asks the layer
        if attention_mask is not None:
            raise ValueError(f"{NAME} under torch.compile takes no attention_mask: leave it out, documents tell all")
        return None
    causal, window = True, None
    for part in _mask_parts(mask_function):
        name = part.__qualname__
        if name not in KNOWN_MASKS:
            raise NotImplementedError(
                f"{NAME} computes causal attention within documents, with or without a sliding window; this model masks with "
                f"{name.split('.')[0]}. Use attn_implementation='sdpa' or 'flex_attention'"
            )
        if name.startswith("bidirectional"):
            causal = False
        elif name.startswith("sliding_window_overlay"):
            window = inspect.getclosurevars(part).nonlocals["sliding_window"]
    if attention_mask is not None:
        attention_mask = attention_mask[:, -kv_length:]
        if attention_mask.all():  # waits for the device, once in a forward, and only for those who pass a mask
            attention_mask = None
    return Pattern(causal, window, attention_mask)


def _mask_parts(mask_function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The functions that a mask function of transformers is put together from."""
    yield mask_function
    for cell in mask_function.__closure__ or ():
        content = cell.cell_contents
        for inner in content if isinstance(content, tuple) else (content,):
            if inspect.isfunction(inner):
                yield from _mask_parts(inner)


# ---- which documents there are ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of T flattened tokens, and what the ways to compute attention derive from them, once.

    Attributes:
        cu_seqlens: (documents + 1,) int32, on the tokens' device, ends at T.
        max_seqlen: length of the longest; an upper bound is right too.
        total: T.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    total: int
    _block_masks: dict[int | None, Any] = field(default_factory=dict)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Of the documents that are not empty, in order. Waits for the device."""
        bounds = self.cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != self.total or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(
                f"{NAME}: cu_seq_lens_q must rise from 0 to the {self.total} tokens of the batch, got {_some(bounds)}"
            )
        return [b - a for a, b in itertools.pairwise(bounds) if b > a]

    @functools.cached_property
    def starts(self) -> Tensor:
        """(T,) int64, where each token's document begins. Does not wait."""
        return torch.arange(self.total, device=self.cu_seqlens.device) - packed_metadata(self.cu_seqlens, self.total)[0]

    @functools.cached_property
    def groups(self) -> tuple[list[tuple[Tensor, int]], Tensor]:
        """Documents of about equal length together: for each group the tokens of its (documents, longest) grid, row by row, and
        how many documents; and (T,) where each token is in all grids one after the other."""
        lengths = torch.tensor(self.lengths)
        begins = lengths.cumsum(0) - lengths
        order = lengths.argsort(descending=True, stable=True)
        grids, place, at = [], torch.empty(self.total, dtype=torch.int64), 0
        for group in _split_sorted(lengths[order].tolist()):
            chosen = order[group]
            longest = int(lengths[chosen[0]])
            column = torch.arange(longest)
            rows = begins[chosen, None] + column.clamp(max=lengths[chosen, None] - 1)
            real = column < lengths[chosen, None]
            place[rows[real]] = at + torch.arange(rows.numel()).view_as(rows)[real]
            grids.append((rows.flatten().to(self.cu_seqlens.device), len(chosen)))
            at += rows.numel()
        return grids, place.to(self.cu_seqlens.device)

    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's mask of causal attention within documents, made block by block and without a host sync.

        The visible tokens of a query reach from ``first`` = its document's start, or where its window begins, to itself, and
        ``first`` never falls from a token to the next. So a block of queries needs the key blocks from the ``first`` of its first
        token on, and those from the ``first`` of its last token on, its own excepted, whole.
        """
        if window not in self._block_masks:
            from torch.nn.attention.flex_attention import BlockMask

            device, size = self.cu_seqlens.device, FLEX_BLOCK
            token = torch.arange(self.total, device=device)
            first = self.starts if window is None else torch.maximum(self.starts, token - window + 1)
            block = torch.arange(-(-self.total // size), device=device)
            last_token = (block * size + size - 1).clamp(max=self.total - 1)
            query, key = block[:, None], block[None, :]
            needed = (key <= query) & (key >= first[block * size, None] // size)
            whole = (key < query) & (key * size >= first[last_token, None])

            def visible(batch, head, query, key):
                return (key <= query) & (key >= first[query])

            def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
                indices = blocks.int().argsort(dim=-1, descending=True, stable=True)
                return blocks.sum(-1, dtype=torch.int32)[None, None], indices.int()[None, None]

            self._block_masks[window] = BlockMask.from_kv_blocks(
                *listed(needed & ~whole), *listed(whole), BLOCK_SIZE=size, mask_mod=visible, seq_lengths=(self.total, self.total)
            )
        return self._block_masks[window]


def _split_sorted(lengths: list[int]) -> Iterator[slice]:
    """Falling lengths cut into groups whose shortest is at least ``GROUP_SHARE`` of their longest, up to a few tokens."""
    begin = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or lengths[i] + 8 < GROUP_SHARE * lengths[begin]:
            yield slice(begin, i)
            begin = i


# What a forward's first layer finds out, its other layers look up: by the tensor that says it and its version.
_found: Any = WeakTensorKeyDictionary()
_found_lock = threading.Lock()


def _look_up(key: Tensor, find: Callable[[], Documents], *more: Any) -> Documents:
    if torch.compiler.is_compiling():
        return find()
    state = (None if key.is_inference() else key._version, *more)
    with _found_lock:
        known = _found.get(key)
    if known is None or known[0] != state:
        known = (state, find())
        with _found_lock:
            _found[key] = known
    return cast(Documents, known[1])


def _documents(
    query: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    max_lengths: tuple[Any, Any],
    padding: Tensor | None,
) -> Documents:
    batch, _, length, _ = query.shape
    total = batch * length
    bounds = cu_seqlens[0] if cu_seqlens[0] is not None else cu_seqlens[1]
    if bounds is not None:
        if padding is not None:
            raise ValueError(
                f"{NAME}: attention_mask has zeros and cu_seq_lens_q is given; leave out the mask: documents tell all"
            )
        _check_bounds(bounds, cu_seqlens[1], query)
        longest = max_lengths[0] if max_lengths[0] is not None else max_lengths[1]

        def given() -> Documents:
            host = int(bounds.diff().max()) if longest is None and bounds.numel() > 1 else int(longest or 0)
            return Documents(
                bounds.detach().to(torch.int32), host, total
            )  # not `bounds` itself: it would keep its own entry alive

        return _look_up(bounds, given, total, longest if isinstance(longest, int) else None)
    if position_ids is None or position_ids.dim() != 2:
        found = "no position_ids" if position_ids is None else f"position_ids of shape {tuple(position_ids.shape)}"
        raise ValueError(
            f"{NAME} cannot tell documents apart: no cu_seq_lens_q and {found} reached the attention layer. Pass cu_seq_lens_q, "
            "cu_seq_lens_k, max_length_q and max_length_k, as packops.PackingCollator(names='hf') makes them"
        )
    if torch.compiler.is_compiling():
        raise ValueError(f"{NAME} under torch.compile needs cu_seq_lens_q and max_length_q: position_ids are read on the host")
    positions = position_ids.expand(batch, length)
    if padding is None:
        return _look_up(position_ids, lambda: _from_positions(positions, None), batch)
    return _look_up(padding, lambda: _from_positions(positions, padding))


def _check_bounds(bounds: Tensor, other: Tensor | None, query: Tensor) -> None:
    if bounds.dim() != 1 or bounds.numel() < 1 or bounds.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{NAME}: cu_seq_lens_q must be (documents + 1,) int32 or int64, got {tuple(bounds.shape)} {bounds.dtype}"
        )
    if bounds.device != query.device:
        raise ValueError(f"{NAME}: cu_seq_lens_q must be on {query.device} as the model is, got {bounds.device}")
    if other is not None and other is not bounds and (other.shape != bounds.shape or (other.is_cpu and not other.equal(bounds))):
        raise ValueError(f"{NAME}: cu_seq_lens_q and cu_seq_lens_k must be the same: a document attends to itself")


def _from_positions(positions: Tensor, padding: Tensor | None) -> Documents:
    """A document begins at each row, wherever positions do not go up by one, and where padding begins or ends. Waits."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    if padding is not None:
        resumes = torch.zeros_like(begins)
        resumes[:, 1:] = padding[:, 1:] & ~padding[:, :-1] & ~begins[:, 1:]
        if (resumes & (padding.cumsum(1) > 1)).any():
            raise NotImplementedError(
                f"{NAME}: attention_mask has zeros inside a document; only padding before or after one will do"
            )
        begins[:, 1:] |= padding[:, 1:] != padding[:, :-1]
    bounds = [*begins.flatten().nonzero().flatten().tolist(), positions.numel()]
    longest = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
    return Documents(torch.tensor(bounds, dtype=torch.int32, device=positions.device), longest, positions.numel())


# ---- the backend -----------------------------------------------------------------------------------------------------------


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Pattern | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = UNSAID,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function of the backend, with the arguments that transformers passes to all of them.

    Args:
        query, key, value: (B, heads, S, head_dim), key and value with heads that divide the query's. The documents are those of
            the B * S flattened tokens.
        attention_mask: what :func:`packed_mask` returned. A (B, 1, S, S_k) mask that the caller made, or that generation with a
            cache needs, is obeyed as transformers' sdpa does.
        sliding_window: used where ``attention_mask`` is no :class:`Pattern`.
        cu_seq_lens_q, max_length_q: the boundaries, (documents + 1,), ending at B * S, and the longest document.
        position_ids: (B, S) or (1, S); tells the boundaries where ``cu_seq_lens_q`` is not given.

    Returns:
        (B, S, heads, head_dim), and None for the attention weights, which are never computed.

    Raises:
        ValueError: documents that are not known, or said twice in different ways.
        NotImplementedError: attention sinks, position biases, attention weights.
    """
    for name in ("s_aux", "position_bias", "output_attentions", "head_mask"):
        argument = unused.get(name)
        if argument is not None and argument is not False:
            raise NotImplementedError(f"{NAME} has no {name}; use attn_implementation='eager'")
    known = cu_seq_lens_q is not None or cu_seq_lens_k is not None
    if isinstance(attention_mask, Tensor) or key.shape[2] != query.shape[2]:
        if known:
            raise ValueError(
                f"{NAME}: cu_seq_lens_q says that documents are packed, so there can be no 4-D attention_mask and no tokens in a "
                f"cache; got {query.shape[2]} queries and {key.shape[2]} keys"
            )
        return _masked(module, query, key, value, attention_mask, scaling, dropout, softcap, is_causal, unused), None
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is None:
        config = getattr(module, "config", None)
        for name in ("sliding_window", "attention_chunk_size"):
            if sliding_window == UNSAID and getattr(config, name, None) is not None:
                raise NotImplementedError(
                    f"{NAME} cannot see without a mask which layers have the {name}; do not compile this model"
                )
        attention_mask = Pattern(is_causal, None if sliding_window == UNSAID else sliding_window)
    pattern = attention_mask
    # A rotation with fp32 tables, or a norm kept in fp32, leaves queries and keys in fp32 where the model computes in 16 bits.
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    documents = _documents(query, position_ids, (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k), pattern.padding)
    causal = pattern.causal and is_causal
    window = pattern.window if pattern.window is not None and pattern.window < documents.max_seqlen else None
    if not causal and (window is not None or softcap is not None):
        raise NotImplementedError(f"{NAME}: bidirectional attention with a sliding window or a softcap")
    path = choose_path(
        query.device,
        query.dtype,
        heads=query.shape[1],
        head_dims=(query.shape[3], value.shape[3]),
        total=documents.total,
        count=documents.cu_seqlens.numel() - 1,
        scaling=scaling,
        dropout=dropout,
        softcap=softcap,
        window=window,
    )
    attend: Callable[..., Tensor] = {"varlen": _attend_varlen, "flex": _attend_flex, "sdpa": _attend_sdpa}[path]
    # (B, heads, S, head_dim) as transformers has it is a view of (T, heads, head_dim)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    output = attend(q, k, v, documents, causal=causal, window=window, softcap=softcap, scaling=scaling, dropout=dropout)
    return output.view(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def choose_path(
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: int,
    head_dims: tuple[int, int],
    total: int,
    count: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    window: int | None = None,
    parameters: frozenset[str] | None = None,
    capability: tuple[int, int] | None = None,
) -> Path:
    """How ``count`` documents of ``total`` tokens are attended to; says nothing about the values.

    Args:
        head_dims: of queries and keys, and of values.
        parameters: what this torch's ``varlen_attn`` takes (torch 2.10 has no window); empty if there is none.
        capability: of the device.
    """
    if device.type != "cuda":
        return "sdpa"
    if softcap is not None:
        return "flex" if dropout == 0 else "sdpa"
    if parameters is None:
        parameters = varlen_parameters()
    can = (
        dtype in (torch.float16, torch.bfloat16)
        and (capability or torch.cuda.get_device_capability(device)) >= (8, 0)
        and head_dims[0] == head_dims[1] <= 256
        and head_dims[0] % 8 == 0
        and dropout == 0
        and "cu_seq_q" in parameters
        and (window is None or "window_size" in parameters)
        and (scaling is None or scaling == head_dims[0] ** -0.5 or "scale" in parameters)
        and count <= max_docs_for_flash_attention(total, heads, head_dims[0])
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


# ---- three ways to compute it: (T, heads, head_dim) -> (T, heads, head_dim) -------------------------------------------------


def _attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    causal: bool,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    parameters = varlen_parameters()
    options: dict[str, Any] = {}
    if "window_size" in parameters:  # on the left, a window of n is n - 1 tokens before the token itself
        options["window_size"] = (-1 if window is None else window - 1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if "scale" in parameters:
        options["scale"] = scaling
    if "enable_gqa" in parameters:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    bounds, longest = documents.cu_seqlens, documents.max_seqlen
    return cast(Tensor, varlen_attn(q, k, v, bounds, bounds, longest, longest, **options))


def _attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    causal: bool,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    output = _flex_attention(q.is_cuda)(
        q,
        k,
        v,
        score_mod=None if softcap is None else capped,
        block_mask=documents.block_mask(window),
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return cast(Tensor, output[0].transpose(0, 1))


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return cast(Callable[..., Any], torch.compile(flex_attention) if compiled else flex_attention)


def _attend_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    causal: bool,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    lengths = documents.lengths
    if not lengths:
        return torch.cat([q[..., :0], v.new_zeros(*q.shape[:2], v.shape[2])], dim=2)
    attend = functools.partial(_causal, window=window, softcap=softcap, scaling=scaling, dropout=dropout)
    if not causal:
        attend = functools.partial(_sdpa, is_causal=False, scaling=scaling, dropout=dropout)
    if not causal or (q.is_cpu and documents.total >= CALL_PER_DOCUMENT * len(lengths)):
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*part) for part in parts], dim=2)[0].transpose(0, 1)
    grids, place = documents.groups
    outputs = []
    for rows, count in grids:
        # a shorter document's row ends in copies of its last token, which come after all of its own
        part = (x.index_select(0, rows).unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
        outputs.append(attend(*part).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, place)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scaling: float | None, dropout: float, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


def _causal(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float | None, scaling: float | None, dropout: float
) -> Tensor:
    """Causal attention of whole documents (N, heads, L, head_dim), a stretch of queries at a time where it needs a mask."""
    length = q.shape[2]
    if window is not None and window >= length:
        window = None
    if window is None and softcap is None:
        return _sdpa(q, k, v, is_causal=True, scaling=scaling, dropout=dropout)
    rows = SCORE_ROWS if window is None else max(window, FLEX_BLOCK)
    outputs = []
    for begin, part in zip(range(0, length, rows), q.split(rows, dim=2), strict=True):
        end = begin + part.shape[2]
        first = 0 if window is None else max(0, begin - window + 1)
        query, key = torch.arange(begin, end, device=q.device)[:, None], torch.arange(first, end, device=q.device)
        mask = key <= query
        if window is not None:
            mask &= key > query - window
        tail = (part, k[:, :, first:end], v[:, :, first:end])
        if softcap is None:
            outputs.append(_sdpa(*tail, mask=mask, scaling=scaling, dropout=dropout))
        else:
            outputs.append(_capped(*tail, mask=mask, softcap=softcap, scaling=scaling, dropout=dropout))
    return torch.cat(outputs, dim=2)


def _capped(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, softcap: float, scaling: float | None, dropout: float) -> Tensor:
    """Attention with scores ``softcap * tanh(q k / softcap)`` (Gemma 2), materialised, at least in fp32."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return (F.dropout(weights, dropout).to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)


def _masked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    is_causal: bool | None,
    more: dict[str, Any],
) -> Tensor:
    """Not packed: a mask that says who sees whom, as transformers' sdpa obeys it."""
    if softcap is not None and isinstance(mask, Tensor):
        allowed = (mask if mask.dtype == torch.bool else mask >= 0).unsqueeze(1)
        return _capped(query, key, value, mask=allowed, softcap=softcap, scaling=scaling, dropout=dropout).transpose(1, 2)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = mask if isinstance(mask, Tensor) else None
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "softcap": softcap, **more}
    return cast(Tensor, sdpa_attention_forward(module, query, key, value, mask, **options)[0])


def _some(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
