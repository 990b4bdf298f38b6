"""Log-probabilities and entropies of a model's labels, without logits: what DPO, GRPO and their kin take from a policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

import packops

from ..data.batch import WEIGHT, PackedBatch
from ..ops.arguments import describe
from ..ops.linear_log_probs import LinearLogProbs
from . import families
from .loss import CausalLMLoss
from .record import pretrained


@dataclasses.dataclass(frozen=True)
class _LogProbsInPlaceOfLoss(CausalLMLoss):
    """Takes the place of the loss for one call: the model's forward knows its head, its scale and its cap."""

    reduction: str = "seq-mean-token-mean"  # for which documents are found in position ids
    temperature: float = 1.0
    entropy: bool = True

    def of_hidden(
        self,
        head: nn.Linear,
        hidden: Tensor,
        labels: Tensor,
        *,
        logit_scale: float,
        softcap: float | None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        kwargs.pop("parents", None)  # of shared prefixes: what a row is scored against stands in shift_labels
        options = self._options(hidden.shape[:-1], labels, None, ignore_index, shift_labels, hidden.device, kwargs)
        if softcap is not None and self.temperature != 1:
            raise ValueError(
                "packops.hf.log_probs: temperature must be 1 for a model that caps its logits: it divides what the cap returns, "
                f"which no option of the product does; got {self.temperature}"
            )
        return packops.linear_log_probs(
            hidden,
            head.weight,  # under autocast the op casts, as the head itself would
            bias=head.bias,
            logit_scale=logit_scale / self.temperature,
            softcap=softcap,
            entropy=self.entropy,
            num_valid=kwargs.get("num_valid"),
            **{name: options[name] for name in ("labels", "shift", "cu_seqlens", "ignore_index")},
        )


def log_probs(
    model: nn.Module, batch: PackedBatch | Mapping[str, Any], *, temperature: float = 1.0, entropy: bool = True, **kwargs: Any
) -> LinearLogProbs:
    """Log-probability and entropy of every label of ``batch``, differentiable, and no logits: :func:`packops.linear_log_probs`.

    Args:
        model: a causal language model after :func:`packops.hf.apply`.
        batch: a :class:`packops.PackedBatch`, or what the model's forward takes by name: ``input_ids``, ``labels``, and for
            packed rows ``position_ids`` that restart or ``cu_seq_lens_q``. Labels are each token's own id, or -100 where there is
            nothing to score, a prompt, say.
        temperature: divides the logits.
        entropy: whether to return it.
        kwargs: more of what the model's forward takes.

    Returns:
        :class:`packops.LinearLogProbs` of shape (B, S). Row t is about the token after t in its document; at a document's last
        token, and where the label does not count, it is 0. Sums per document: ``packops.document_sums(out.log_probs,
        batch.cu_seqlens)``.

    Raises:
        TypeError: ``batch`` is neither, as a list of documents is.
        ValueError: ``apply`` has not been called, or could not keep this model from making its logits (``packops.hf.report``
            says why); there are no labels; a temperature for a model with a softcap; a wrapper that rounds what the model
            returns to 16 bits.
    """
    if isinstance(batch, PackedBatch):  # a label that weighs nothing in a loss has a log-probability
        columns = {name: column for name, column in batch.columns.items() if name != WEIGHT}
        batch = dataclasses.replace(batch, columns=columns).to_hf()
    if not isinstance(batch, Mapping):
        raise TypeError(f"packops.hf.log_probs: batch must be a PackedBatch or a mapping, got {describe(batch)}")
    inputs = {**batch, **kwargs}
    if inputs.get("labels") is None and inputs.get("shift_labels") is None:
        raise ValueError("packops.hf.log_probs: batch must have labels, got none")
    if not temperature > 0:
        raise ValueError(f"packops.hf.log_probs: temperature must be positive, got {temperature}")
    families.require_transformers()
    target: Any = pretrained(model)
    loss = vars(target).get("_loss_function")
    if not isinstance(loss, CausalLMLoss):
        raise ValueError(f"packops.hf.log_probs: call packops.hf.apply on this {type(target).__name__} first")
    inputs["skip_logits"] = True
    target._loss_function = _LogProbsInPlaceOfLoss(temperature=float(temperature), entropy=entropy)
    try:
        found = model(**inputs).loss
    finally:
        target._loss_function = loss
    if not isinstance(found, LinearLogProbs):
        raise ValueError(
            f"packops.hf.log_probs: this {type(target).__name__} makes its logits whatever it is asked; packops.hf.report(model) "
            "says why"
        )
    if found.log_probs.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"packops.hf.log_probs: log-probabilities are float32, and what wraps this {type(target).__name__} rounded them to "
            f"{found.log_probs.dtype}: mixed precision of FSDP casts what the model returns, unless it is told otherwise, "
            "MixedPrecisionPolicy(output_dtype=None)"
        )
    return cast(LinearLogProbs, found)
