"""Calls of a model whose result would be wrong without a word: they are refused, with what to do instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

import packops

from ..data.collator import IMAGES
from . import families
from .adapters import drops_positions, reason_against_packing
from .attention_documents import begin_anew, go_back, go_on, may_read
from .loss import CausalLMLoss
from .record import check_classes
from .rope import check_layers


def check_forward(
    model: Any, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any], never_looks: bool, **fixed: Any
) -> None:
    """Raise for calls whose result would be wrong, of a forward whose arguments have these names; adds missing positions to
    ``kwargs``. Waits for no device, unless :func:`packops.checks` is on."""
    check_classes(model)
    given = {**dict(zip(names, args, strict=False)), **kwargs, **fixed}
    if "position_ids" in names and (positions := _missing_positions(given)) is not None:
        given["position_ids"] = kwargs["position_ids"] = positions
    _check_call(model, given, never_looks)


def _missing_positions(given: Mapping[str, Any]) -> Tensor | None:
    """(B, S) the positions in packed documents, where boundaries are given and positions are not: the model would count on. None
    where there is nothing to add."""
    bounds, tokens = given.get("cu_seq_lens_q"), given.get("input_ids")
    if bounds is None or bounds.numel() <= 2 or tokens is None or given.get("past_key_values") is not None:
        return None
    if any(given.get(name) is not None for name in ("position_ids", "parents", *IMAGES)):
        return None
    return packops.packed_metadata(bounds.to(tokens.device), tokens.numel())[0].view(tokens.shape)


def _check_call(model: Any, given: Mapping[str, Any], never_looks: bool) -> None:
    scored = given.get("labels") is not None or given.get("shift_labels") is not None
    trains = model.training and torch.is_grad_enabled()
    if (scored or trains) and not torch.compiler.is_compiling():  # not for each token that is generated
        check_layers(model)
    if not scored and trains and _by_document(model):
        raise ValueError(_ignored(model, "it was called without labels"))
    if given.get("token_weight") is not None:
        why = ""
        if scored and not isinstance(model.loss_function, CausalLMLoss):
            why = "the model's loss is not packops'. packops.hf.apply(model, cross_entropy=True) replaces it"
        elif trains and given.get("labels") is None:
            why = "it has no labels. The loss of a compute_loss_func, or of Trainer's label smoothing, knows no weights"
        if why:
            raise ValueError(f"packops.hf: token_weight is given, and this call would not use it: {why}")
    positions = given.get("position_ids")
    images = [name for name in IMAGES if given.get(name) is not None]
    if images and positions is not None and positions.dim() == 2 and _has_mrope(model.config):
        raise ValueError(
            f"packops.hf: {images[0]} with position_ids of shape {tuple(positions.shape)}, but images have "
            "positions in three dimensions here (M-RoPE). Pass those of its get_rope_index, document by document, or none"
        )
    config = model.base_model.config.get_text_config(decoder=True)  # the model's own, unless its decoder is another by now
    if given.get("parents") is not None and config._attn_implementation != "packops_varlen":
        raise ValueError(
            f"packops.hf: attention {config._attn_implementation!r} does not know documents that share prefixes (parents): use "
            "packops.hf.apply(model, attention='packops_varlen') or, with 'sdpa' and no sliding windows, "
            "forest.to_hf(attention='sdpa')"
        )
    bounds, mask, cache = given.get("cu_seq_lens_q"), given.get("attention_mask"), given.get("past_key_values")
    if isinstance(mask, Tensor) and mask.dim() == 4:
        _check_obeyed(config, mask, given.get("token_weight") is not None)
    is_row_mask = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)  # others say who sees whom
    # On a GPU these are not read. Who trains with positions and no mask has packed rows, or can leave the positions out.
    unread = trains and mask is None and positions is not None and positions.dim() == 2 and not may_read(positions)
    packed = ""
    if bounds is not None and bounds.numel() > 2:
        packed = "cu_seq_lens_q"
        if cache is not None or (positions is None and given.get("input_ids") is None):
            raise ValueError(
                f"packops.hf: cu_seq_lens_q with a cache, or with embeddings and no position_ids. {_PROMPT_LEARNING}"
            )
        if model.config.model_type in families.NO_POSITIONS:
            raise ValueError(
                f"packops.hf: packed documents (cu_seq_lens_q) have wrong positions in {model.config.model_type!r}, which takes "
                "no position_ids"
            )
    elif cache is not None and is_row_mask and (unread or go_back(positions, mask)):
        raise ValueError(
            f"packops.hf: position_ids of packed documents with a cache. {_PROMPT_LEARNING}, without position_ids or with an "
            "attention_mask"
        )
    elif (scored or trains) and drops_positions(model, given):
        raise ValueError(
            "packops.hf: embeddings, position_ids=None and a model without a parameter to train: position_ids were dropped, "
            f"which may have told documents apart. {_PROMPT_LEARNING}, or leave position_ids out where rows are not packed"
        )
    reason = reason_against_packing(model)
    tells = bool(packed) or given.get("parents") is not None or unread
    if reason is not None and (tells or (is_row_mask and begin_anew(positions, mask))):
        raise ValueError(
            f"packops.hf: packed documents would change each other by {reason}. Train it on padded rows, without position_ids or "
            "with an attention_mask"
        )
    if not is_row_mask or config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
        return  # whatever attends was told who sees whom, or takes the boundaries
    if not packed and begin_anew(positions, mask):
        packed = "position_ids that begin at 0 again"
    if not packed:
        return
    family, name = model.config.model_type, config._attn_implementation
    if never_looks:
        raise ValueError(
            f"packops.hf: with {name!r}, {family!r} of transformers {families.installed()} never looks where packed documents "
            f"({packed}) begin: they would see each other. packops.hf.apply(model, attention='packops_varlen') keeps them "
            "apart where the family takes it; a newer transformers may look"
        )
    if positions is None:  # beside images, whose positions are the model's to find
        raise ValueError(
            f"packops.hf: cu_seq_lens_q without position_ids, by which alone {name!r} tells documents apart: they would see each "
            "other. Pass position_ids too"
        )
    if go_on(positions, bounds):
        raise ValueError(
            f"packops.hf: position_ids go on from one document of cu_seq_lens_q to the next, and {name!r} tells documents apart "
            "by positions alone: pass positions that begin anew, as packops.PackingCollator makes them, or none"
        )
    _check_told_apart(name, packed, mask, _uses_cache(config, given))


_PROMPT_LEARNING = (
    "PEFT's prompt learning (prompt, prefix and p-tuning) calls so: it puts its tokens before the first document alone, and "
    "drops or shifts the positions of all. Train it on padded rows"
)


def _check_obeyed(config: Any, mask: Tensor, is_forest: bool) -> None:
    """ValueError for a 4-D mask that transformers would take for another one."""
    if mask.dtype == torch.bool and config._attn_implementation == "eager":
        raise ValueError(
            "packops.hf: a 4-D attention_mask of bools, which 'eager' would add to the scores as 0 and 1: use 'sdpa' or "
            "packops.hf.apply(model, attention='packops_varlen')"
        )
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = window is not None and window < mask.shape[-1] and (kinds is None or any("sliding" in kind for kind in kinds))
    if is_forest and slides:
        raise ValueError(
            f"packops.hf: layers with a sliding window, here of {window} tokens, obey a 4-D attention_mask in its place, and "
            "PackedForest's has no window: use packops.hf.apply(model, attention='packops_varlen') and to_hf()"
        )


def _check_told_apart(name: str, packed: str, mask: Tensor | None, uses_cache: bool) -> None:
    """ValueError unless the attention ``name`` of transformers keeps packed documents apart, which it does by positions alone."""
    if mask is not None or uses_cache:
        beside = "an attention_mask" if mask is not None else "use_cache=True, the configuration's default"
        raise ValueError(
            f"packops.hf: {packed} with {beside}, beside which transformers does not look for packed documents: with {name!r} "
            "they would see each other. Pass use_cache=False and no mask, as PackedBatch.to_hf() does, or "
            "packops.hf.apply(model, attention='packops_varlen')"
        )


def _uses_cache(config: Any, given: Mapping[str, Any]) -> bool:
    wanted = given.get("use_cache")
    return given.get("past_key_values") is not None or bool(getattr(config, "use_cache", False) if wanted is None else wanted)


def _has_mrope(config: Any) -> bool:
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return "mrope_section" in parameters


def _ignored(model: Any, why: str) -> str:
    return (
        f"packops.hf: this model's loss has reduction={model.loss_function.reduction!r}, and {why}, so it would not be used. "
        "TRL's trainers and a compute_loss_func compute a loss of their own: let the model compute it, as docs/hugging_face.md "
        "shows for TRL, or use packops.hf.apply(model, reduction='mean')"
    )


def watch(model: Any, forward: Any, never_looks: bool) -> Any:
    """A forward that somebody puts in place of the model's: TRL's computes log-probabilities from the decoder's hidden states and
    passes by what stands in the model's own forward."""
    if not isinstance(forward, MethodType) or forward.__self__ is not model:
        return forward
    function = forward.__func__
    takes = "fused_lm_head" in getattr(getattr(function, "__code__", None), "co_varnames", ())
    if not takes and not _by_document(model):
        return forward
    names = list(inspect.signature(function).parameters)[1:]

    @functools.wraps(function)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused_lm_head"):
            if _by_document(self):
                raise ValueError(_ignored(self, "TRL asked it for log-probabilities (fused_lm_head=True)"))
            if kwargs.get("token_weight") is not None:
                raise ValueError(
                    "packops.hf: token_weight is given, and this call would not use it: TRL asked for log-probabilities "
                    "(fused_lm_head=True), of which it computes a loss of its own. Let the model compute the loss, as "
                    "docs/hugging_face.md shows for TRL"
                )
            check_forward(self, names, args, kwargs, never_looks, use_cache=False)  # as TRL calls the decoder
        return function(self, *args, **kwargs)

    return MethodType(watched, model)


def _by_document(model: Any) -> bool:
    loss = model.loss_function
    return isinstance(loss, CausalLMLoss) and loss.reduction != "mean"
