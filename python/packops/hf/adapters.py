"""Adapters of PEFT that take a row for one document: what they compute at a token depends on other documents of a packed row.

LoRA and most of its kin change a layer's weight, which is as right for packed rows as for others. These look at the whole row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def reason_against_packing(model: nn.Module) -> str | None:
    """Why an adapter that is active in ``model`` must not see packed rows, in words; None: no adapter minds."""
    configs = vars(model).get("peft_config")  # PEFT leaves it on the model, and so does transformers' own integration of it
    if not isinstance(configs, Mapping):
        return None
    for name, config in configs.items():
        why = None
        if getattr(config, "alora_invocation_tokens", None) is not None:
            why = "it begins at the last place of a row where its invocation tokens (alora_invocation_tokens) stand"
        elif getattr(config, "peft_type", None) == "LILY":
            why = "it chooses its weights by a mean over all tokens of the batch (LILY)"
        if why and _is_active(model, name):
            return f"PEFT's adapter {name!r}: {why}"
    return None


def _is_active(model: nn.Module, name: str) -> bool:
    for module in model.modules():
        active = getattr(module, "active_adapters", None)
        if isinstance(active, (list, tuple)) and name in active and not module.disable_adapters:
            return True
    return False


def drops_positions(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether a call is one of PEFT's prompt tuning or p-tuning that was given ``position_ids``: it puts its tokens before each
    row and calls a frozen model with embeddings, and with None for positions only if there were some."""
    dropped = "position_ids" in given and given["position_ids"] is None and given.get("attention_mask") is None
    if not dropped or given.get("inputs_embeds") is None or given.get("input_ids") is not None:
        return False
    return not any(parameter.requires_grad for parameter in model.parameters())
