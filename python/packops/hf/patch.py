"""apply, revert, report: what packops replaces in a Hugging Face model, instance by instance."""

from __future__ import annotations

import threading
from importlib import import_module

from torch import nn

from . import families
from . import loss as _loss
from . import mlp as _mlp
from . import norm as _norm
from . import rope as _rope
from .record import ATTRIBUTE, Record, Report

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

    Changes this instance and nothing else: no class, no module of transformers or torch, no other model. Parameters and state
    dict stay as they are. Call it before the model is wrapped (accelerate, DDP, FSDP, torch.compile), before or after PEFT wraps
    it, and once more to change the options.

    Args:
        model: a ``PreTrainedModel``, or a wrapper around one (PEFT).
        rope: rotate q and k with :func:`packops.apply_rope`, by fp32 tables from fp64 angles; where q and k pass through RMS
            norms first (Qwen3, Gemma 3, OLMo 2), with :func:`packops.apply_qk_norm_rope`.
        cross_entropy: compute the loss with :func:`packops.cross_entropy`, which reads ``num_items_in_batch``,
            ``cu_seq_lens_q`` and ``shift_labels``; and, in training, with :func:`packops.linear_cross_entropy`, which makes no
            logits: ``outputs.logits`` is then None. ``model(..., skip_logits=False)`` gives them; without gradients or in
            evaluation mode they are there anyway.
        attention: name of an attention implementation to switch to, ``"packops_varlen"`` or any of transformers; None: as it is.
        reduction: ``"mean"`` over tokens, ``"seq-mean-token-mean"`` or ``"seq-mean-token-sum"``.
        rms_norm: compute RMS norms, other than those that RoPE takes along, with :func:`torch.nn.functional.rms_norm`, whose
            kernels are fused on CUDA. Norms that compute anything else, or are not known, stay as they are.
        mlp: compute gated MLPs (SwiGLU, GeGLU) with :func:`packops.gated_linear`, which keeps gate and up for the backward pass
            and nothing else; with :func:`packops.gated_activation` where the down projection is more than its weight (LoRA,
            hooks). MLPs that compute anything else stay as they are.

    Returns:
        ``model`` itself. :func:`report` says what was replaced.

    Raises:
        ValueError: a part of the model is not what packops knows how to replace; nothing is changed then. ``rope=False`` or
            ``cross_entropy=False`` leaves that part alone.
        ImportError: transformers is missing or too old.
    """
    families.require_transformers()
    _loss.check_reduction(reduction)
    target = pretrained(model)
    with _LOCK:
        if (present := _record(target)) is not None:
            present.undo()
            del vars(target)[ATTRIBUTE]
        record = Record(_blank(target))
        try:
            absorbed = _rope.patch(target, record) if rope else []
            if rms_norm:
                _norm.patch(target, record, absorbed)
            if mlp:
                _mlp.patch(target, record)
            if cross_entropy:
                _loss.patch(target, reduction, record)
            if attention is not None:
                _attend(target, attention, record)
        except BaseException:
            record.undo()
            raise
        if record.changes:
            vars(target)[ATTRIBUTE] = record
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`apply`: every module has the attributes it had. Without effect on a model that is not patched.

    Raises:
        RuntimeError: something else replaced the same attributes since (accelerate's mixed precision wraps ``model.forward``).
    """
    families.require_transformers()
    target = pretrained(model)
    with _LOCK:
        if (record := _record(target)) is not None:
            record.undo()
            del vars(target)[ATTRIBUTE]
        else:
            vars(target).pop(ATTRIBUTE, None)  # what is left of it in a model that was pickled
    return model


def report(model: nn.Module) -> Report:
    """What :func:`apply` replaced in ``model``; print it."""
    families.require_transformers()
    target = pretrained(model)
    record = _record(target)
    return _blank(target) if record is None else record.report


def pretrained(model: nn.Module) -> nn.Module:
    """The transformers model in a wrapper."""
    from transformers import PreTrainedModel

    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise TypeError(f"packops.hf: model must be a transformers.PreTrainedModel or hold one, got {type(model).__name__}")
    return found


def _record(model: nn.Module) -> Record | None:
    return vars(model).get(ATTRIBUTE)


def _blank(model: nn.Module) -> Report:
    family = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
    return Report(type(model).__name__, family, family in families.TESTED)


def _attend(model: nn.Module, name: str, record: Record) -> None:
    if name == "packops_varlen":
        import_module("packops.hf.attention").register()
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    model.set_attn_implementation(name)  # type: ignore[operator]
    for config, old in zip(configs, before, strict=True):
        new = config._attn_implementation
        config._attn_implementation_internal = old
        record.set("its configuration", config, "_attn_implementation_internal", new)
    if model.config._attn_implementation != name:  # type: ignore[union-attr]
        raise ValueError(f"packops.hf: {type(model).__name__} does not take attention={name!r}")
    record.say("attention", name)


def _configs(model: nn.Module) -> list:
    """The configurations of a model and of the models in it, each once."""
    configs: dict[int, object] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs.setdefault(id(config), config)
    return list(configs.values())
