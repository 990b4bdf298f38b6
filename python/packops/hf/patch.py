"""apply, revert, report: what packops replaces in a Hugging Face model, instance by instance."""

from __future__ import annotations

import dataclasses
import threading

from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ..data.batch import check_reduction
from . import attention as _attention
from . import families
from . import forward as _forward
from . import mlp as _mlp
from . import norm as _norm
from . import residual as _residual
from . import rope as _rope
from .record import ATTRIBUTE, Record, Report, pretrained, record_of, strip_copies

_LOCK = threading.RLock()


def apply(
    model: nn.Module,
    *,
    rope: bool = True,
    cross_entropy: bool = True,
    attention: str | None = None,
    reduction: str = "mean",
    rms_norm: bool = True,
    mlp: bool = True,
) -> nn.Module:
    """Make a Hugging Face causal language model compute with packops; :func:`revert` undoes it.

    Changes this instance and nothing else: no class, no module of transformers or torch, no other model, even one that shares
    its configuration. Parameters and state dict stay as they are. Call it before the model is wrapped (accelerate, DDP, FSDP,
    torch.compile), before or after PEFT wraps it, and once more to change the options. Copies, pickled ones too, are patched.

    Args:
        model: a ``PreTrainedModel``, or a wrapper around one (PEFT).
        rope: rotate q and k with :func:`packops.apply_rope`, by fp32 tables from fp64 angles; where q and k pass through RMS
            norms first (Qwen3, Gemma 3, OLMo 2), with :func:`packops.apply_qk_norm_rope`. In these layers the gradients of what
            q, k and v are projected from add up in the matrix products.
        cross_entropy: compute the loss with :func:`packops.cross_entropy`, which reads ``num_items_in_batch``,
            ``cu_seq_lens_q`` and ``shift_labels``; and, in training, with :func:`packops.linear_cross_entropy`, which makes no
            logits: ``outputs.logits`` is then None. ``model(..., skip_logits=False)`` gives them; without gradients or in
            evaluation mode they are there anyway.
        attention: name of an attention implementation to switch to, ``"packops_varlen"`` or any of transformers; None: as it is.
            Vision and audio towers keep theirs.
        reduction: ``"mean"`` over tokens, ``"seq-mean-token-mean"`` or ``"seq-mean-token-sum"``.
        rms_norm: compute RMS norms, other than those that RoPE takes along, with :func:`packops.rms_norm` on CUDA and
            :func:`torch.nn.functional.rms_norm` elsewhere. Norms that compute anything else, or are not known, stay as they are.
            Where a layer adds its residual and normalises the sum, :func:`packops.add_rms_norm` does both.
        mlp: compute gated MLPs (SwiGLU, GeGLU) with :func:`packops.gated_mlp`, which keeps gate and up for the backward pass
            and nothing else between x and the result; with :func:`packops.gated_linear` or :func:`packops.gated_activation` where
            the first projections or the last one are more than their weights (LoRA, hooks). MLPs that compute anything else stay
            as they are.

    Returns:
        ``model`` itself. :func:`report` says what was replaced.

    Raises:
        ValueError: a part of the model is not what packops knows how to replace; nothing is changed then. ``rope=False`` or
            ``cross_entropy=False`` leaves that part alone.
        ImportError: transformers is missing or too old.
    """
    families.require_transformers()
    check_reduction(reduction, "packops.hf: ")
    target = pretrained(model)
    with _LOCK, _disable_current_modes():  # modules are asked with real numbers, in a FakeTensorMode too
        _undo(target)
        record = Record(_blank(target))
        try:
            absorbed = _rope.patch(target, record) if rope else []
            if rms_norm:
                _norm.patch(target, record, absorbed)
                _residual.patch(target, record)
            if mlp:
                _mlp.patch(target, record)
            if cross_entropy:
                _forward.patch(target, reduction, record)
            else:
                _forward.guard(target, record)
            if attention is not None:
                _attention.patch(model, target, attention, record)
        except BaseException:
            record.undo()
            raise
        if getattr(target, "_is_stateful", False) or record.report.family in families.STATEFUL:
            record.note(
                "layers of this model carry a state from token to token, besides attention: documents see each other, unless "
                "these layers are told where they begin (seq_idx). packops.verify shows it"
            )
        if record.changes:
            vars(target)[ATTRIBUTE] = record
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`apply`: every module has the class and the attributes it had. Without effect on a model that is not patched.

    Raises:
        RuntimeError: something else replaced the same attributes since (accelerate's mixed precision wraps ``model.forward``).
    """
    families.require_transformers()
    target = pretrained(model)
    with _LOCK:
        _undo(target)
    return model


def report(model: nn.Module) -> Report:
    """What :func:`apply` replaced in ``model``; print it."""
    families.require_transformers()
    target = pretrained(model)
    record = record_of(target)
    if record is None:
        return _blank(target)
    changed_since = _rope.notes(target) if "rope" in record.report.replaced else []
    return dataclasses.replace(record.report, notes=record.report.notes + changed_since)


def _undo(target: nn.Module) -> None:
    if (record := record_of(target)) is not None:
        record.undo()
        del vars(target)[ATTRIBUTE]
    _attention.follow(target, strip_copies(target))


def _blank(model: nn.Module) -> Report:
    family = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
    return Report(type(model).__name__, family, family in families.TESTED)
