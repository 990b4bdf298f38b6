"""Proof for a model: its documents packed give the loss and the gradients of its documents one by one."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import reference
from .data.batch import WEIGHT, PackedBatch, check_reduction
from .data.collator import PackingCollator
from .data.counts import as_count, counted
from .data.documents import length_of
from .data.forest import PackedForest
from .data.packing import pack
from .distributed import loss_normalizer
from .ops.arguments import checks_annotations

Forward = Callable[[nn.Module, PackedBatch], Tensor]
Loss = Callable[[nn.Module, PackedBatch, Tensor], Tensor]

# Largest difference, relative to the largest value of the same kind, that is rounding rather than a mistake. In fp64 too, as
# models of transformers compute their norms and rotary angles in fp32 whatever their dtype.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}

# The same for what one document changes in another, which is exactly 0 in most models, whatever their dtype.
LEAK_TOLERANCE = 2 * torch.finfo(torch.float32).eps

# In units of the dtype's rounding, for models whose layers add up tokens of several documents. Experts compute the tokens that
# are routed to them together, so other tokens change the order of additions: up to 5 units were seen in fp32 and none in 16 bits.
# Scans of state spaces subtract running sums over a chunk: 12 in fp32, and flipped roundings in 16 bits.
LEAK_UNITS = {torch.float64: 16, torch.float32: 16, torch.float16: 2, torch.bfloat16: 2}
ADDS_UP_TOKENS = re.compile("expert|moe|A_log")  # in the name of a parameter

# Gradients below this share of the largest of all are compared with that instead: some are nothing but rounding (keys' biases).
SMALL_GRADIENT = 1e-3


@dataclasses.dataclass
class VerifyReport:
    """What :func:`verify` saw. ``print(report)`` for people, :meth:`to_dict` for machines.

    Attributes:
        ok: packed equals one by one, within ``tolerance``, and no document sees another.
        loss_alone, loss_packed: the step's loss, documents one by one and packed.
        loss_difference: the largest difference of a micro-batch's share of them, relative to the whole loss. Shares, because
            untrained models score all tokens alike, and wrong weights then hardly show in the sum.
        gradient_differences: by parameter, the largest difference of a gradient's element, relative to the largest element of
            that parameter's gradient (or to a thousandth of the largest of all, if that is more).
        logit_differences: (documents,) largest difference of a document's logits alone and packed, relative to the largest.
        leaks: (documents, documents), row i, column j: how much document j's logits change when document i's tokens do, relative
            to the largest logit; NaN where the two share no pack. 0 off the diagonal unless something is wrong.
        noise: what the same forward pass differs by when repeated.
        leak_tolerance: what is more counts as a leak: ten times ``noise``, or two roundings of fp32 if that is more. Models with
            experts or state spaces, whose layers add up tokens of several documents, are allowed 16 roundings of fp32, and in 16
            bits 2 of theirs.
        rounding: of the coarsest dtype, relative to a value: what is less may leak and not be seen.
        tolerance: for the differences above.
        packs: documents in each packed micro-batch.
        findings: what is wrong, in words; empty if ``ok``.
    """

    ok: bool
    loss_alone: float
    loss_packed: float
    loss_difference: float
    gradient_differences: dict[str, float]
    logit_differences: Tensor
    leaks: Tensor
    noise: float
    leak_tolerance: float
    rounding: float
    tolerance: float
    packs: list[list[int]]
    findings: list[str]

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The parameter whose gradient differs most, and by how much."""
        return max(self.gradient_differences.items(), key=lambda item: item[1], default=("none", 0.0))

    @property
    def worst_leak(self) -> float:
        """The largest change of one document by another."""
        off_diagonal = self.leaks.masked_fill(torch.eye(len(self.leaks), dtype=torch.bool), 0).nan_to_num()
        return float(off_diagonal.max()) if len(self.leaks) else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        plain = dataclasses.asdict(self)
        plain["logit_differences"] = self.logit_differences.tolist()
        plain["leaks"] = [[None if value != value else value for value in row] for row in self.leaks.tolist()]
        return plain

    def __str__(self) -> str:
        name, gradient = self.worst_gradient
        documents = sum(map(len, self.packs))
        rows = [
            ("loss", f"{self.loss_packed:.6f} packed, {self.loss_alone:.6f} one by one", self.loss_difference),
            ("gradients", f"{len(self.gradient_differences)} parameters, worst {name}", gradient),
            ("logits", counted(documents, "document"), float(self.logit_differences.max()) if documents else 0.0),
        ]
        lines = [
            f"packed {'EQUALS' if self.ok else 'DOES NOT EQUAL'} one by one: {counted(documents, 'document')} in "
            f"{counted(len(self.packs), 'pack')}"
        ]
        if not self.gradient_differences:
            del rows[1]
        for what, detail, difference in rows:
            verdict = "ok" if difference <= self.tolerance else "DIFFERS"
            lines.append(f"  {what:<10} {difference:8.1e}  (tolerance {self.tolerance:.0e})  {verdict:<8} {detail}")
        leak = self.worst_leak
        verdict = "ok" if leak <= self.leak_tolerance else "LEAKS"
        lines.append(
            f"  {'leaks':<10} {leak:8.1e}  (tolerance {self.leak_tolerance:.0e})  {verdict:<8} one document changes another"
        )
        if self.rounding > torch.finfo(torch.float32).eps and verdict == "ok":
            lines.append(
                f"  {'':<10} leaks below {self.rounding:.0e} of a value may be rounded away: fp32 shows them (--dtype fp32)"
            )
        if verdict == "LEAKS":
            lines += ["  leak matrix: row i changes column j ('.': no, '#': yes, ' ': not in one pack)", *self._leak_picture()]
        return "\n".join(lines + [f"  -> {finding}" for finding in self.findings])

    def _leak_picture(self) -> list[str]:
        def cell(i: int, j: int) -> str:
            value = float(self.leaks[i, j])
            return " " if value != value else "\\" if i == j else "#" if value > self.leak_tolerance else "."

        shown = range(min(32, len(self.leaks)))
        rows = ["    " + f"{i:>3} " + "".join(cell(i, j) for j in shown) for i in shown]
        return rows + (["    ..."] if len(shown) < len(self.leaks) else [])


def hf_forward(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Logits of a Hugging Face causal language model for a packed batch, called as packops recommends."""
    inputs = batch.to_hf()
    del inputs["labels"]
    return model(**inputs).logits


def hf_loss(model: nn.Module, batch: PackedBatch, num_items: Tensor) -> Tensor:
    """The loss such a model computes itself, as ``transformers.Trainer`` asks for it."""
    from .hf.record import pretrained, record_of

    inputs = batch.to_hf() | {"num_items_in_batch": num_items.to(batch.device)}
    target = pretrained(model)
    if record_of(target) is not None:  # the way that training takes, although the model is in evaluation mode
        inputs["skip_logits"] = True
    # The balancing loss of a mixture of experts is of a micro-batch's tokens together: by its definition another one when packed.
    if getattr(target.config.get_text_config(), "output_router_logits", False):  # type: ignore[union-attr, operator]
        inputs["output_router_logits"] = False
    return model(**inputs).loss


@checks_annotations
def verify(
    model: nn.Module,
    documents: Sequence[Any],
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    reduction: str = "mean",
    max_length: int | None = None,
    collator: Callable[[Sequence[Any]], PackedBatch] | None = None,
    tolerance: float | None = None,
    leaks: bool = True,
    gradients: bool = True,
    share_prefixes: bool = False,
) -> VerifyReport:
    """Train on documents one by one and packed, without a step, and compare losses, gradients and logits.

    The documents alone are the truth: each in a row of its own, their losses put together by :mod:`packops.reference`. The packed
    run is yours: ``forward`` and ``loss`` are what your training loop does with a micro-batch, and the micro-batches' losses are
    added up. The model runs in evaluation mode, so that dropout does not matter, and gets its mode and gradients back.

    Args:
        model: a Hugging Face causal language model, or any module whose ``forward`` you pass. The balancing loss of a mixture of
            experts is left out: it is of a micro-batch's tokens together.
        documents: as :class:`packops.PackingCollator` takes them; half a dozen of uneven lengths say most.
        forward: ``forward(model, batch)`` -> logits (1, T, V). By default a Hugging Face model is called with
            :meth:`packops.PackedBatch.to_hf`.
        loss: ``loss(model, batch, num_items)`` -> the micro-batch's share of the step's loss, with ``num_items`` from
            :func:`packops.loss_normalizer`. By default a Hugging Face model's own loss; with ``forward`` given,
            ``packops.cross_entropy`` on its logits.
        reduction: ``"mean"``, ``"seq-mean-token-mean"`` or ``"seq-mean-token-sum"``: the loss that is meant.
        max_length: capacity of a pack; by default such that there are about two micro-batches, with ``share_prefixes`` one.
        collator: makes the batches; by default a :class:`packops.PackingCollator`.
        tolerance: largest relative difference; by default 1e-6, 1e-4, 1e-2, 4e-2 for fp64, fp32, fp16, bf16, the coarsest of
            the parameters, the logits and autocast.
        leaks: also change each document in turn and look at the others: one forward pass a document. A model in 16 bits rounds
            away small leaks, which one in fp32 shows.
        gradients: compare gradients too; without, nothing runs backward (FlexAttention cannot on the CPU).
        share_prefixes: pack prefixes that documents share once (:class:`packops.PackedForest`), however short they are. ``loss``
            and ``forward`` then get such batches.

    Returns:
        A :class:`VerifyReport`; ``report.ok`` is the answer.

    Raises:
        TypeError, ValueError: an argument that is not as above, or with which nothing would be verified; it is named.
    """
    check_reduction(reduction)
    max_length = as_count("max_length", max_length, optional=True)
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be positive and finite, got {tolerance}")
    if forward is None:
        _check_causal(model)
    documents = [document for document in documents if length_of(document)]
    if len(documents) < 2:
        raise ValueError(
            f"documents must be at least two that have a token, got {len(documents)}: one alone has nothing to be packed with"
        )
    if loss is None:
        loss = hf_loss if forward is None else _loss_of_logits(forward, reduction)
    if collator is None:
        collator = (
            PackingCollator(share_prefixes=True, min_shared=1, reduction=reduction) if share_prefixes else PackingCollator()
        )
    alone_collator = collator
    if share_prefixes:
        alone_collator = PackingCollator(  # of the same documents: what they score, and what else they hold
            ignore_index=getattr(collator, "ignore_index", -100), columns=getattr(collator, "columns", None)
        )
    run = _Run(model, forward or hf_forward, loss, reduction, collator, alone_collator)
    modes = {module: module.training for module in model.modules()}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    try:
        model.eval()
        with torch.set_grad_enabled(gradients):
            return run.compare(documents, max_length, tolerance, leaks)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name]


def default_max_length(lengths: Sequence[int]) -> int:
    """A capacity that gives about two packs, the first of which holds at least two documents."""
    return max(-(-sum(lengths) // 2), *lengths, sum(lengths[:2]))


def packs_of(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """The documents of each pack, in their order."""
    if (longest := max(lengths)) > max_length:  # pack would advise to cut it, which is nothing to verify with
        raise ValueError(f"max_length must be at least the longest document ({longest} tokens), got {max_length}")
    return [list(map(int, p)) for p in pack(lengths, max_length, strategy="sequential")]


def _check_causal(model: nn.Module) -> None:
    if not hasattr(model, "loss_function"):
        raise ValueError(
            f"{type(model).__name__} is no Hugging Face model, so verify cannot know how to call it: "
            "pass forward=lambda model, batch: logits"
        )
    from .hf.loss import scores_the_next_token
    from .hf.record import pretrained

    target = pretrained(model)
    if not scores_the_next_token(target) or target.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(
            f"{type(target).__name__} is no causal language model: verify compares the loss of every token's successor. "
            "Verify the language model that it is made from, whose documents are packed in the same way"
        )


def _loss_of_logits(forward: Forward, reduction: str) -> Loss:
    from .functional import cross_entropy

    def loss(model: nn.Module, batch: PackedBatch, num_items: Tensor) -> Tensor:
        logits = forward(model, batch)
        if isinstance(batch, PackedForest):
            labels = cast(Tensor, batch.shift_labels)
            return cross_entropy(
                logits, labels, token_weight=batch.token_weight, num_items=num_items, ignore_index=batch.ignore_index
            )
        return cross_entropy(  # type: ignore[call-overload]
            logits,
            batch.labels,
            cu_seqlens=batch.cu_seqlens,
            shift=True,
            reduction=reduction,
            num_items=num_items,
            ignore_index=batch.ignore_index,
            token_weight=batch.columns.get(WEIGHT),
        )

    return loss


def _batch_of(collator: Callable[[Sequence[Any]], PackedBatch], documents: Sequence[Any]) -> PackedBatch:
    batch = collator(documents)
    if not isinstance(batch, PackedBatch):
        raise TypeError(
            f"collator must return a packops.PackedBatch, got a {type(batch).__name__} "
            "(PackingCollator(names='hf') makes a dictionary)"
        )
    return batch


@dataclasses.dataclass
class _Run:
    model: nn.Module
    forward: Forward
    loss: Loss
    reduction: str
    collator: Callable[[Sequence[Any]], PackedBatch]
    alone_collator: Callable[[Sequence[Any]], PackedBatch]

    def compare(self, documents: list[Any], max_length: int | None, tolerance: float | None, with_leaks: bool) -> VerifyReport:
        parameter = next(self.model.parameters(), None)
        if parameter is None:
            raise ValueError("model must have parameters: nothing would be verified about their gradients")
        device = parameter.device
        lengths = [length_of(document) for document in documents]
        shares = self.collator is not self.alone_collator  # then siblings must meet
        capacity = max_length or (sum(lengths) if shares else default_max_length(lengths))
        packs = packs_of(lengths, capacity)
        if all(len(members) == 1 for members in packs):
            raise ValueError(f"max_length = {max_length} leaves every document in a pack of its own: nothing would be verified")
        alone = [_batch_of(self.alone_collator, [document]).to(device) for document in documents]
        batches = [_batch_of(self.collator, [documents[i] for i in p]).to(device) for p in packs]
        if not shares and any(isinstance(batch, PackedForest) for batch in batches):
            raise ValueError("collator shares prefixes: that needs share_prefixes=True")
        forests = [batch for batch in batches if isinstance(batch, PackedForest)]
        if forests and not any((batch.parents >= 0).any() for batch in forests):
            raise ValueError("no two documents of a pack share a prefix: nothing would be verified about shared prefixes")

        for members, batch in zip(packs, batches, strict=True):
            if batch.lengths != (expected := tuple(alone[i].lengths[0] for i in members)):
                raise ValueError(
                    f"collator must keep all documents of a pack, of lengths {expected}: its batch has {batch.lengths}"
                )
        num_items = loss_normalizer(batches, reduction=self.reduction, gradients="sum")
        if float(num_items) == 0:
            raise ValueError("no token of these documents is scored: nothing would be verified about losses")

        truth = self.alone(alone)
        dtypes = {truth.dtype, *(parameter.dtype for parameter in self.model.parameters())}
        if torch.is_autocast_enabled(device.type):  # heads may return fp32
            dtypes.add(torch.get_autocast_dtype(device.type))
        if tolerance is None:
            tolerance = max(TOLERANCES.get(dtype, 4e-2) for dtype in dtypes)
        packed, gradients, logits = self.packed(batches, num_items)
        scale = max(_largest(values[values.isfinite()]) for values in truth.logits)
        order = list(itertools.chain(*packs))
        logit_differences = torch.zeros(len(documents), dtype=torch.float64)
        for i, mine in zip(order, logits, strict=True):
            logit_differences[i] = _relative(_largest(_difference(mine, truth.logits[i])), scale)
        floor = SMALL_GRADIENT * max((float(g.abs().max()) for g in truth.gradients.values()), default=0.0)
        gradient_differences = {
            name: _relative(_largest(gradients[name] - g), max(float(g.abs().max()), floor))
            for name, g in truth.gradients.items()
        }
        alone_by_pack = torch.stack([truth.losses[members].sum() for members in packs])
        loss_difference = _relative(_largest(packed - alone_by_pack), abs(float(truth.losses.sum())))
        noise, leaks = (
            self.leaks(documents, packs, batches, scale) if with_leaks else (0.0, torch.zeros(len(documents), len(documents)))
        )
        roundings = {d: max(torch.finfo(d).eps, torch.finfo(torch.float32).eps) for d in LEAK_UNITS if d in dtypes}
        allowed = [10 * noise, LEAK_TOLERANCE]
        if any(ADDS_UP_TOKENS.search(name) for name, _ in self.model.named_parameters()):
            allowed += [LEAK_UNITS[d] * rounding for d, rounding in roundings.items()]
        report = VerifyReport(
            ok=False,
            loss_alone=float(truth.losses.sum()),
            loss_packed=float(packed.sum()),
            loss_difference=loss_difference,
            gradient_differences=gradient_differences,
            logit_differences=logit_differences,
            leaks=leaks,
            noise=noise,
            leak_tolerance=max(allowed),
            rounding=max(roundings.values(), default=0.0),
            tolerance=tolerance,
            packs=packs,
            findings=[],
        )
        report.findings = self.explain(report, packed, batches)
        report.ok = not report.findings
        return report

    def logits(self, batch: PackedBatch) -> Tensor:
        found = self.forward(self.model, batch)
        if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[:2] != batch.input_ids.shape:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"forward must return the logits of each token, (1, {batch.num_tokens}, V), got {got}")
        if found.shape[2] <= int(batch.input_ids.max()):
            raise ValueError(
                f"forward must return logits over the vocabulary, and token {int(batch.input_ids.max())} is not one of their "
                f"{found.shape[2]} columns: is this a head for something else?"
            )
        return found

    def alone(self, batches: list[PackedBatch]) -> _Truth:
        """Each document in a row of its own; the loss of all of them by its formula, in fp64."""
        denominator = float(loss_normalizer(batches, reduction=self.reduction, gradients="sum"))
        self.model.zero_grad(set_to_none=True)
        losses, all_logits = [], []
        for batch in batches:
            logits = self.logits(batch)
            share = _reference_loss(logits, batch, self.reduction, denominator)
            if share.requires_grad:  # not without a scored token, nor where gradients are not asked for
                share.backward()
            losses.append(share.detach())
            all_logits.append(batch.unpack(logits.detach())[0].double())
        return _Truth(_on_host(losses), all_logits, self.take_gradients(), logits.dtype)

    def packed(self, batches: list[PackedBatch], num_items: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Each micro-batch's share of the loss, the gradients of all, and each document's logits."""
        self.model.zero_grad(set_to_none=True)
        shares = []
        for batch in batches:
            share = self.loss(self.model, batch, num_items)
            if share.requires_grad:
                share.backward()
            shares.append(share.detach())
        gradients = self.take_gradients()
        with torch.no_grad():
            logits = [part.double() for batch in batches for part in batch.unpack(self.forward(self.model, batch))]
        return _on_host(shares), gradients, logits

    def take_gradients(self) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            return {}
        return {
            name: torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.double()
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def leaks(
        self, documents: list[Any], packs: list[list[int]], batches: list[PackedBatch], scale: float
    ) -> tuple[float, Tensor]:
        """How far the same pass differs from itself, and how much changing one document changes each."""
        known = torch.cat([batch.input_ids.unique() for batch in batches]).unique()
        if len(known) < 2:
            raise ValueError("documents must hold at least two different tokens: nothing could be changed to look for leaks")
        matrix = torch.full((len(documents), len(documents)), float("nan"), dtype=torch.float64)
        noise = 0.0
        for members, batch in zip(packs, batches, strict=True):
            before = batch.unpack(self.forward(self.model, batch).float())
            again = batch.unpack(self.forward(self.model, batch).float())
            noise = max([noise, *(_relative(_largest(_difference(a, b)), scale) for a, b in zip(again, before, strict=True))])
            for place, i in enumerate(members):
                changed = batch.input_ids.clone()
                rows = batch.own_rows(place)
                # every token becomes the next one that occurs here: another one, and of the vocabulary
                changed[0, rows] = known[(torch.searchsorted(known, changed[0, rows]) + 1) % len(known)]
                after = batch.unpack(self.forward(self.model, dataclasses.replace(batch, input_ids=changed)).float())
                for j, new, old in zip(members, after, before, strict=True):
                    matrix[i, j] = _relative(_largest(_difference(new, old)), scale)
        return noise, matrix

    def explain(self, report: VerifyReport, packed: Tensor, batches: list[PackedBatch]) -> list[str]:
        """What is wrong, each symptom traced to its likeliest cause."""
        findings = []
        leaks = report.worst_leak > report.leak_tolerance
        first_of_pack = {members[0] for members in report.packs}
        moved = [i for i, d in enumerate(report.logit_differences.tolist()) if not d <= report.tolerance]
        if leaks:
            findings.append(
                "documents see each other: attention (or a recurrent layer) is not blocked at document boundaries. A Hugging "
                "Face model blocks them only without an attention_mask and with use_cache=False (its default is True), or given "
                "cu_seq_lens_q/k (PackedBatch.to_hf()); FlashAttention wants its varlen form"
            )
        elif moved and not first_of_pack & set(moved):
            findings.append(
                f"documents {_some(moved)} have other logits packed than alone, though none sees another and the first of each "
                "pack is right: positions do not restart (position_ids, or the table that the model learned)"
            )
        elif moved:
            findings.append(f"documents {_some(moved)} have other logits packed than alone: the forward pass depends on the row")
        if not report.loss_difference <= report.tolerance and not moved:
            findings.append(self._explain_loss(report, packed, batches))
        name, gradient = report.worst_gradient
        if not gradient <= report.tolerance and not findings:
            findings.append(f"the loss is right but the gradient of {name} is not: look at the backward pass of what you patched")
        return findings

    @torch.no_grad()
    def _explain_loss(self, report: VerifyReport, packed: Tensor, batches: list[PackedBatch]) -> str:
        """Every token's logits are right and the loss is not: try the known ways to put it together wrongly."""
        if any(isinstance(batch, PackedForest) for batch in batches):
            return (
                "every document's logits are right but the loss is not: score shift_labels with token_weight, by the step's count"
            )
        logits = [self.forward(self.model, batch) for batch in batches]
        tokens = torch.tensor([float(batch.denominator_of("mean")) for batch in batches], dtype=torch.float64)
        documents = sum(batch.num_sequences for batch in batches)
        sums = _on_host(_reference_loss(x, b, "mean", 1.0) for x, b in zip(logits, batches, strict=True))
        across, across_tokens = [], []  # with each document's last token scored against the next one's first
        for x, batch in zip(logits, batches, strict=True):
            ids = torch.where(batch.seq_idx[0] < batch.num_documents, batch.input_ids[0], batch.ignore_index)
            across.append(reference.cross_entropy(x[0, :-1], ids[1:], reduction="sum", ignore_index=batch.ignore_index))
            across_tokens.append(float((ids[1:] != batch.ignore_index).sum()))
        across_sums, across_counts = _on_host(across), torch.tensor(across_tokens, dtype=torch.float64)
        means, across_means = sums / torch.where(tokens == 0, 1, tokens), across_sums / across_counts.clamp(min=1)
        boundary = "the last token of each document is scored against the first of the next: mask the boundary labels"
        per_micro_batch = (
            "each micro-batch is divided by its own count, and these means are added or averaged: divide by the whole step's "
            "(num_items_in_batch, num_items=packops.loss_normalizer(...))"
        )
        candidates = [
            (means / len(means), per_micro_batch),
            (means, per_micro_batch),
            (across_sums / tokens.sum(), boundary),
            (across_sums / across_counts.sum(), boundary),
            (across_means / len(means), f"{boundary}; also, {per_micro_batch}"),
            (across_means, f"{boundary}; also, {per_micro_batch}"),
        ]
        if self.reduction != "mean":
            by_token = (
                f"the loss weighs every token alike, which is not {self.reduction!r}: a Hugging Face model computes that after "
                "packops.hf.apply(model, reduction=...) (packops verify --apply)"
            )
            candidates += [(sums / tokens.sum(), by_token), (sums / documents, by_token)]
        for shares, cause in candidates:
            if _largest(shares - packed) <= report.tolerance * float(shares.sum()):
                return cause
        return "every document's logits are right but the loss is not: labels or normalisation"


@dataclasses.dataclass
class _Truth:
    losses: Tensor  # (documents,) each one's share of the step's loss
    logits: list[Tensor]  # of each document
    gradients: dict[str, Tensor]
    dtype: torch.dtype  # of the logits, as they came


def _reference_loss(logits: Tensor, batch: PackedBatch, reduction: str, denominator: float) -> Tensor:
    return reference.cross_entropy(
        logits,
        batch.labels,
        cu_seqlens=batch.cu_seqlens,
        shift=True,
        reduction=reduction,
        num_items=denominator,
        ignore_index=batch.ignore_index,
        token_weight=batch.columns.get(WEIGHT),
    )


def _on_host(values: Iterable[Tensor]) -> Tensor:
    return torch.stack([value.double().reshape(()).cpu() for value in values])


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """0 where both are the same infinity, as masked columns of a padded vocabulary are."""
    return torch.where(a == b, 0, a - b)


def _largest(difference: Tensor) -> float:
    """The largest absolute value; infinite where a value is not a number, so that it exceeds every tolerance."""
    return float(difference.abs().nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def _relative(difference: float, scale: float) -> float:
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return shown + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")
