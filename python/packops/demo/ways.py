"""The three ways to put one step's documents through the model.

Every way turns the documents of an optimizer step into micro-batches and gives each micro-batch's share of the step's loss, so
that the shares, and their gradients, add up over the step. What is meant, and what ``Padded`` computes, is

    loss = 1/D sum_d 1/n_d sum_t loss(d, t)        (D documents; document d predicts n_d tokens)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast
from unittest import mock

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import packops

IGNORE = -100
DOCUMENT_ATTENTION = "packops_demo_documents"
TokenArrays = Sequence[NDArray[Any]]


class Way(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def attention(self) -> str: ...

    def batches(self, documents: TokenArrays, step: int) -> list[Any]: ...

    def loss(self, model: LlamaForCausalLM, batch: Any) -> Tensor: ...


@dataclass(frozen=True)
class PaddedBatch:
    input_ids: Tensor  # (documents, longest)
    attention_mask: Tensor  # (documents, longest), 1 where there is a token
    documents_in_step: int


@dataclass(frozen=True)
class Padded:
    """A row per document, filled up to the longest of its micro-batch."""

    documents_per_batch: int
    device: torch.device
    name: str = "padded"
    attention: str = "sdpa"

    def batches(self, documents: TokenArrays, step: int = 0) -> list[PaddedBatch]:
        found = []
        for start in range(0, len(documents), self.documents_per_batch):
            rows = [torch.from_numpy(row) for row in documents[start : start + self.documents_per_batch]]
            input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
            attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
            found.append(PaddedBatch(input_ids.to(self.device), attention_mask.to(self.device), len(documents)))
        return found

    def loss(self, model: LlamaForCausalLM, batch: PaddedBatch) -> Tensor:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        targets = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORE)[:, 1:]
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
        return (losses.view_as(targets).sum(1) / (targets != IGNORE).sum(1)).sum() / batch.documents_in_step


@dataclass(frozen=True)
class Pack:
    """Documents end to end. ``slots`` is each token's place in a (documents, longest) grid."""

    input_ids: Tensor  # (1, tokens)
    cu_seqlens: Tensor  # (documents + 1,) int32
    position_ids: Tensor  # (1, tokens)
    slots: Tensor  # (tokens,)
    lengths: list[int]
    packs_in_step: int
    documents_in_step: int


def make_packs(documents: TokenArrays, pack_length: int, *, seed: int, step: int, device: torch.device) -> list[Pack]:
    """The documents of a step in as few packs of at most ``pack_length`` tokens as best fit manages."""
    plan = packops.pack([len(document) for document in documents], pack_length, seed=seed, epoch=step)
    packs = []
    for chosen in plan:
        lengths = [len(documents[i]) for i in chosen]
        input_ids = torch.cat([torch.from_numpy(documents[i]) for i in chosen]).to(device)
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        position_ids, seq_idx = packops.packed_metadata(cu_seqlens, len(input_ids))
        slots = seq_idx * max(lengths) + position_ids
        packs.append(Pack(input_ids[None], cu_seqlens, position_ids[None], slots, lengths, plan.num_packs, len(documents)))
    return packs


@dataclass(frozen=True)
class _OfPacks:
    pack_length: int
    seed: int
    device: torch.device

    def batches(self, documents: TokenArrays, step: int) -> list[Pack]:
        return make_packs(documents, self.pack_length, seed=self.seed, step=step, device=self.device)


@dataclass(frozen=True)
class Careless(_OfPacks):
    """Packs without their documents' boundaries, as ``model(input_ids=pack, labels=pack).loss`` averaged over the packs.

    Every token sees all documents before its own, positions run on through the pack, a document's last token learns to predict
    the next document, and the loss is a mean over tokens, then over packs, whatever number of documents and tokens they hold.
    """

    name: str = "careless"
    attention: str = "sdpa"

    def loss(self, model: LlamaForCausalLM, batch: Pack) -> Tensor:
        return model(input_ids=batch.input_ids, labels=batch.input_ids).loss / batch.packs_in_step


@dataclass(frozen=True)
class Packops(_OfPacks):
    """The same packs, and every document trained as if it were alone."""

    name: str = "packops"
    attention: str = DOCUMENT_ATTENTION

    def loss(self, model: LlamaForCausalLM, batch: Pack) -> Tensor:
        with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", rotate):
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, pack=batch).logits
        loss = packops.cross_entropy(
            logits[0],
            batch.input_ids[0],
            cu_seqlens=batch.cu_seqlens,
            shift=True,
            reduction="seq-mean-token-mean",
            num_items=batch.documents_in_step,
        )
        return cast(Tensor, loss)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """What ``apply_rotary_pos_emb`` of transformers does; ``cos`` and ``sin`` are already those of ``position_ids``."""
    return cast("tuple[Tensor, Tensor]", packops.apply_rope(q, k, cos, sin, layout="bhsd", per_token_table=True))


def attend_each(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float | None) -> Tensor:
    """Causal attention of each document in a call of its own: the least work, and what a CPU likes best."""
    parts = (x.split(pack.lengths, dim=2) for x in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2)


def attend_grid(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float | None) -> Tensor:
    """The same in one call, with the documents spread over a padded grid meanwhile: few launches, which is what a GPU likes best.

    The varlen kernels that need no grid take bf16 and fp16 only; here weights are compared to fp32 rounding.
    """
    longest = max(pack.lengths)

    def spread(x: Tensor) -> Tensor:
        grid = x.new_zeros(len(pack.lengths) * longest, x.shape[1], x.shape[3])
        grid = grid.index_copy(0, pack.slots, x[0].transpose(0, 1))
        return grid.view(len(pack.lengths), longest, x.shape[1], x.shape[3]).transpose(1, 2)

    output = F.scaled_dot_product_attention(
        spread(query), spread(key), spread(value), is_causal=True, scale=scale, enable_gqa=True
    )
    return output.transpose(1, 2).flatten(0, 1)[pack.slots].transpose(0, 1)[None]


def document_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    pack: Pack,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention that never crosses a document, as a backend of transformers. It takes the pack itself, for two traps.

    transformers finds the documents of a pack in ``position_ids`` only if there is neither a mask nor a cache, and
    ``use_cache=True`` is its default: then attention crosses documents without a word. What it builds when it finds them is a
    mask of tokens x tokens, with all the work of attending across documents.
    """
    attend = attend_grid if query.is_cuda else attend_each
    return attend(query, key, value, pack, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
