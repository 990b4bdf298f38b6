"""The documents that a batch of a Hugging Face model holds: read off its arguments once a forward, whatever attends to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.weak import WeakIdRef

from .. import _checks
from ..data.documents import document_begins
from ..ops.attention_documents import Documents, look_up

NAME = "packops_varlen"


def find_documents(
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

        if longest is None:
            refuse_fake(bounds, "cu_seq_lens_q without max_length_q")

        def given() -> Documents:
            host = _longest(bounds) if longest is None else int(longest)
            if longest is not None and may_read(bounds) and host < (least := _longest(bounds)):
                raise ValueError(
                    f"{NAME}: max_length_q must be at least the longest document of cu_seq_lens_q ({least}), got {host}"
                )
            # not `bounds` itself: it would keep its own entry alive
            return Documents(bounds.detach().to(torch.int32), host, total)

        return look_up(bounds, given, total, longest if isinstance(longest, int) else None)
    if position_ids is None or position_ids.dim() != 2:
        found = "no position_ids" if position_ids is None else f"position_ids of shape {tuple(position_ids.shape)}"
        raise ValueError(
            f"{NAME} cannot tell documents apart: no cu_seq_lens_q and {found} reached the attention layer. Pass cu_seq_lens_q, "
            "cu_seq_lens_k, max_length_q and max_length_k, as packops.PackingCollator(names='hf') makes them"
        )
    if torch.compiler.is_compiling():
        raise ValueError(f"{NAME} under torch.compile needs cu_seq_lens_q and max_length_q: position_ids are read on the host")
    refuse_fake(position_ids, "position_ids without cu_seq_lens_q")
    positions = position_ids.expand(batch, length)
    if padding is None:
        return look_up(position_ids, lambda: _from_positions(positions, None), batch)
    if position_ids.is_inference():  # which count no versions
        return _from_positions(positions, padding)
    return look_up(padding, lambda: _from_positions(positions, padding), WeakIdRef(position_ids), position_ids._version)


def may_read(bounds: Tensor) -> bool:
    """Whether the values can be looked at: without a wait for the device, or with :func:`packops.checks` on."""
    return not torch.compiler.is_compiling() and not is_fake(bounds) and (bounds.is_cpu or _checks.enabled())


def refuse_fake(x: Tensor, what: str) -> None:
    """ValueError where ``x`` must be read and has no numbers."""
    if not torch.compiler.is_compiling() and is_fake(x):
        raise ValueError(
            f"{NAME} reads {what}, and got a fake tensor (FakeTensorMode), which has no numbers: pass cu_seq_lens_q and "
            "max_length_q, as PackedBatch.to_hf() does, and no attention_mask"
        )


def begin_anew(positions: Tensor | None, mask: Tensor | None) -> bool:
    """Whether a row holds several documents, as far as positions (B, S) that may be read tell: one is 0, and the token before it
    is no padding by ``mask`` (B, S)."""
    return _somewhere(positions, mask, lambda before, at: at == 0)


def go_back(positions: Tensor | None, mask: Tensor | None) -> bool:
    """The same where positions do not begin at 0, since there are tokens in a cache: one is less than the one before it."""
    return _somewhere(positions, mask, lambda before, at: at < before)


def _somewhere(positions: Tensor | None, mask: Tensor | None, begins_at: Callable[[Tensor, Tensor], Tensor]) -> bool:
    if positions is None or positions.dim() != 2 or positions.shape[1] < 2 or not may_read(positions):
        return False
    begins = begins_at(positions[:, :-1], positions[:, 1:])
    if mask is not None and mask.shape[-1] >= positions.shape[1]:  # longer: it has what stands in the cache, too
        mask = mask[:, -positions.shape[1] :]
        begins = begins & (mask[:, :-1] != 0) & (mask[:, 1:] != 0)
    return bool(begins.any())


def go_on(positions: Tensor | None, bounds: Tensor | None) -> bool:
    """Whether positions (B, S) that may be read go up by one from one document of ``bounds`` to the next."""
    if positions is None or bounds is None or positions.dim() != 2 or not may_read(positions):
        return False
    flat, inner = positions.flatten(), bounds[1:-1].to(positions.device).long()
    inner = inner[(inner > 0) & (inner < len(flat))]
    return bool((flat[inner] == flat[inner - 1] + 1).any())


def _longest(bounds: Tensor) -> int:
    return int(bounds.diff().max()) if bounds.numel() > 1 else 0


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
    begins = document_begins(positions)
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
