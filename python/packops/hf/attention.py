"""Attention in which documents never see each other, as a backend of transformers: ``packops_varlen``.

    packops.hf.attention.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="packops_varlen")
    model(**packops.PackingCollator(names="hf")(documents))

transformers' own backends find the documents of a packed row only where there is neither a mask nor a cache, and
``use_cache=True`` is the default; two of them disagree about where a document begins. Here the boundaries come from
``cu_seq_lens_q``, or else from ``position_ids``, whatever else is passed; where neither says, the call is refused.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

import packops

from ..ops.attention_documents import Documents
from ..ops.attention_paths import ATTEND, Rule, attend_forest_on_cpu, choose_path, in_graph, shaped_attention
from . import families, rewrite
from .attention_documents import NAME, find_documents, may_read, refuse_fake
from .record import Record, decoder_of

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
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig  # noqa: F401  (only 5 has all)
    except ImportError as error:
        raise ModuleNotFoundError("packops.hf needs transformers >= 5: pip install '.[hf]'") from error
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
    return NAME


# ---- switching a model to it -------------------------------------------------------------------------------------------------


def patch(wrapper: nn.Module, model: nn.Module, name: str, record: Record) -> None:
    """Have the text part of ``model`` attend with the implementation ``name``; vision and audio towers keep theirs.

    transformers reads the name in the configuration, which several models may share: this one gets a copy of its own.
    """
    if name == NAME:
        register()
        _check_masks(model)
    _copy_configurations(wrapper, record)
    config = cast(Any, model).config
    text = config.get_text_config(decoder=True)
    cast(Any, model).set_attn_implementation(_asked_of(config, text, name))
    if text._attn_implementation != name:
        raise ValueError(f"packops.hf: {type(model).__name__} does not take attention={name!r}")
    follow(model, decoder_of(model).modules())
    record.replaced("attention", name)


def follow(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Have ``modules`` attend as the text part of ``model``: copies of layers (PEFT's ``modules_to_save``) have copies of its
    configuration, which a change of the model's does not reach."""
    text = cast(Any, model).config.get_text_config(decoder=True)
    for module in modules:
        own: Any = vars(module).get("config")
        if own is not text and type(own) is type(text) and own._attn_implementation != text._attn_implementation:
            own._attn_implementation = text._attn_implementation


def _copy_configurations(model: nn.Module, record: Record) -> None:
    from transformers import PreTrainedConfig

    memo: dict[int, Any] = {}  # what is one configuration stays one
    for path, module in model.named_modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                record.set(path or "the model", module, attribute, copy.deepcopy(value, memo))


def _asked_of(config: Any, text: Any, name: str) -> dict[str, Any]:
    """The implementation as transformers wants it for a configuration and the one for text within it, and no other."""
    asked: dict[str, Any] = {"": name}
    for key in config.sub_configs:
        below = getattr(config, key, None)
        if below is not None and config is not text and _holds(below, text):
            asked[key] = name if below is text else _asked_of(below, text, name)
    return asked


def _holds(config: Any, text: Any) -> bool:
    return config is text or any(
        _holds(below, text) for k in config.sub_configs if (below := getattr(config, k, None)) is not None
    )


def _check_masks(model: nn.Module) -> None:
    """Raise where layers compute with the mask themselves (sparse attention, dynamic masks), as there will be none, or where a
    query's keys are not of the same row."""
    decoder = decoder_of(model)
    crosses = any("CrossAttention" in type(module).__name__ for module in decoder.modules())
    if crosses or getattr(cast(Any, model).config, "is_encoder_decoder", False):
        raise ValueError(
            f"packops.hf: {type(model).__name__} does not take attention={NAME!r}: it attends to more than its own tokens"
        )
    if families.makes_own_mask(model):
        raise ValueError(
            f"packops.hf: {type(model).__name__} of transformers {families.installed()} does not take attention={NAME!r}: it "
            "makes its mask by itself. Models of transformers 5.2 and newer do not"
        )
    attention = [module for module in decoder.modules() if _attends(rewrite.class_of(module))]
    layers = {child for module in attention for child in module.modules()}
    for path, module in decoder.named_modules():
        if module in layers and _reads_mask(rewrite.class_of(module)):
            raise ValueError(
                f"packops.hf: {type(model).__name__} does not take attention={NAME!r}: {path} ({type(module).__name__}) computes "
                "with the attention mask itself, and this implementation makes none. attention=None leaves attention as it is"
            )


def _attends(cls: Any) -> bool:
    from transformers import PreTrainedModel

    if issubclass(cls, PreTrainedModel):  # whose methods only set the name of an implementation
        return False
    return any("ALL_ATTENTION_FUNCTIONS" in function.__code__.co_names for function in rewrite.methods_of(cls))


@rewrite.cache_of_class
def _reads_mask(cls: type) -> bool:
    """Whether a method of ``cls`` does more with its mask than to pass it on."""
    return any(
        _takes_apart(function, name) for function in rewrite.methods_of(cls) for name in _parameters(function) if "mask" in name
    )


def _parameters(function: FunctionType) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _takes_apart(function: FunctionType, name: str) -> bool:
    try:
        definition = rewrite.parse(function)
    except rewrite.CannotRewriteError:
        return False

    def is_it(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == name

    for node in ast.walk(definition):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and is_it(node.value):
            return True
        if isinstance(node, ast.BinOp) and (is_it(node.left) or is_it(node.right)):
            return True
        # torch.where(mask, ...), scores.masked_fill(mask, ...); but not attention_interface(..., mask) and self.indexer(mask)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id != "self" and any(is_it(argument) for argument in node.args):
                return True
    return False


# ---- who sees whom ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """What transformers asked its mask to say, in place of a mask.

    Attributes:
        causal: no token sees a later one.
        window: a token sees itself and the ``window - 1`` tokens before it; None: all before it.
        padding: (B, S) bool, False where there is padding; None: nowhere.
        shape: of the mask that it stands for, (B, 1, S, S).
    """

    causal: bool = True
    window: int | None = None
    padding: Tensor | None = None
    shape: tuple[int, ...] = ()
    ndim = 4  # ``generate`` with a static cache, and some models, make their masks beforehand and hand them on

    def contiguous(self) -> Pattern:
        return self


def packed_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | Pattern | None = None,
    cache_position: Tensor | None = None,
    **options: Any,
) -> Pattern | Tensor | None:
    """The mask function of the backend: transformers calls it once in a forward, for each kind of layer.

    With tokens in a cache (generation) there is nothing packed, and it is the mask of transformers' sdpa. Under ``torch.compile``
    it is None, and what the layer says of its window holds.

    Raises:
        NotImplementedError: the model wants another pattern than causal, windowed or bidirectional attention.
    """
    if isinstance(attention_mask, Pattern):  # made beforehand
        return attention_mask
    queries: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset}
    if cache_position is not None:  # older transformers: the queries' positions in place of their number
        queries, q_length = {"cache_position": cache_position}, len(cache_position)
    if kv_length != q_length:
        from transformers.masking_utils import sdpa_mask

        options["allow_is_causal_skip"] = options["allow_is_bidirectional_skip"] = False
        keys: dict[str, Any] = {"kv_length": kv_length, "kv_offset": kv_offset}
        made = sdpa_mask(
            batch_size=batch_size, mask_function=mask_function, attention_mask=attention_mask, **queries, **keys, **options
        )
        return cast("Tensor | None", made)
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
        refuse_fake(attention_mask, "attention_mask")
        attention_mask = attention_mask[:, -kv_length:]
        if attention_mask.all():  # waits for the device, once in a forward, and only for those who pass a mask
            attention_mask = None
    return Pattern(causal, window, attention_mask, (batch_size, 1, q_length, kv_length))


def _mask_parts(mask_function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The functions that a mask function of transformers is put together from."""
    yield mask_function
    for cell in mask_function.__closure__ or ():
        content = cell.cell_contents
        for inner in content if isinstance(content, tuple) else (content,):
            if inspect.isfunction(inner):
                yield from _mask_parts(inner)


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
    s_aux: Tensor | None = None,
    parents: Tensor | None = None,
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
        s_aux: (heads,) attention sinks.
        parents: (documents,) where documents share prefixes (:class:`packops.PackedForest`), with ``cu_seq_lens_q``.

    Returns:
        (B, S, heads, head_dim), and None for the attention weights, which are never computed.

    Raises:
        ValueError: documents that are not known, or said twice in different ways; boundaries in a replica of
            ``torch.nn.DataParallel``, which has cut them.
        NotImplementedError: position biases, attention weights.
    """
    for name in ("position_bias", "output_attentions", "head_mask"):
        argument = unused.get(name)
        if argument is not None and argument is not False:
            raise NotImplementedError(f"{NAME} has no {name}")
    known = cu_seq_lens_q is not None or cu_seq_lens_k is not None
    if known and "_is_replica" in vars(module):
        raise ValueError(
            f"{NAME}: torch.nn.DataParallel cuts cu_seq_lens_q along its first dimension, as if it were a batch: documents get "
            "lost; use one process per GPU (DistributedDataParallel)"
        )
    if isinstance(attention_mask, Tensor) or key.shape[2] != query.shape[2]:
        if known:
            raise ValueError(
                f"{NAME}: cu_seq_lens_q says that documents are packed, so there can be no 4-D attention_mask and no tokens in a "
                f"cache; got {query.shape[2]} queries and {key.shape[2]} keys"
            )
        masked = Rule(softcap=softcap, scaling=scaling, dropout=dropout, sinks=s_aux)
        return _masked(module, query, key, value, attention_mask, masked, is_causal, unused), None
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
    # (B, heads, S, head_dim) as transformers has it is a view of (T, heads, head_dim)
    q, k, v = (x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    rule = Rule(pattern.causal and is_causal, pattern.window, softcap, scaling, dropout, s_aux)
    if parents is not None:
        output = _over_prefixes(q, k, v, cu_seq_lens_q, parents, rule, pattern.padding)
    else:
        bounds, longest = (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k)
        output = _within(q, k, v, find_documents(query, position_ids, bounds, longest, pattern.padding), rule)
    # some families go on with .view(), which wants it contiguous
    return output.reshape(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).contiguous(), None


def _within(q: Tensor, k: Tensor, v: Tensor, documents: Documents, rule: Rule) -> Tensor:
    """Documents that share nothing."""
    # A window that no document reaches is none. A length that nobody checked may be wrong: then only one past the row goes.
    reach = documents.max_seqlen if may_read(documents.cu_seqlens) or not rule.causal else documents.total
    if rule.window is not None and rule.window >= reach:
        rule = Rule(rule.causal, None, rule.softcap, rule.scaling, rule.dropout, rule.sinks)
    if not rule.causal and (rule.window is not None or rule.shapes_scores):
        raise NotImplementedError(f"{NAME}: bidirectional attention with a sliding window, a softcap or sinks")
    path = choose_path(
        q.device,
        q.dtype,
        rule,
        heads=q.shape[1],
        head_dims=(q.shape[2], v.shape[2]),
        total=documents.total,
        count=documents.cu_seqlens.numel() - 1,
        longest=documents.max_seqlen,
    )
    # In a graph nobody reads the lengths that sdpa's calls need: packops.attention knows what to do there.
    plain = rule.causal and rule.dropout == 0 and rule.sinks is None
    if path == "packops" or (path == "sdpa" and plain and in_graph(documents.cu_seqlens)):
        return packops.attention(q, k, v, documents.cu_seqlens, causal=rule.causal, **rule.options)
    if path == "sdpa":
        refuse_fake(documents.cu_seqlens, "lengths of documents beside dropout, sinks or bidirectional attention")
    return ATTEND[path](q, k, v, documents, rule)


def _over_prefixes(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, parents: Tensor, rule: Rule, padding: Tensor | None
) -> Tensor:
    """Documents that share prefixes."""
    if cu_seqlens is None or padding is not None:
        raise ValueError(f"{NAME}: parents want cu_seq_lens_q, where segments begin, and no attention_mask: PackedForest.to_hf()")
    if not rule.causal or rule.dropout or rule.sinks is not None:
        raise NotImplementedError(f"{NAME}: shared prefixes with bidirectional attention, dropout or sinks")
    if q.is_cuda:
        return packops.attention(q, k, v, cu_seqlens, parents, **rule.options)
    return attend_forest_on_cpu(q, k, v, cu_seqlens, parents, rule)


def _masked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    rule: Rule,
    is_causal: bool | None,
    more: dict[str, Any],
) -> Tensor:
    """Not packed: a mask that says who sees whom, as transformers' sdpa obeys it."""
    if rule.shapes_scores:
        if not isinstance(mask, Tensor):  # a single new token, which sees all that is in the cache
            mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        allowed = (mask if mask.dtype == torch.bool else mask >= 0).unsqueeze(1)
        return shaped_attention(query, key, value, rule, mask=allowed).transpose(1, 2)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = mask if isinstance(mask, Tensor) else None
    options = {"dropout": rule.dropout, "scaling": rule.scaling, "softcap": rule.softcap, "is_causal": is_causal, **more}
    return cast(Tensor, sdpa_attention_forward(module, query, key, value, mask, **options)[0])
