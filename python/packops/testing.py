"""How packops judges numbers: tolerances by dtype, error metrics, and where GPUs are. Public, so that users can check their own.

The reference is always float64 (:mod:`packops.reference`); "as accurate as torch" is measured, not assumed: see
:func:`assert_no_worse_than`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    rtol: float
    atol: float


# Four units in the last place, relative, for a result rounded once; absolute near zero, for sums of terms of order one.
_TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(4 * 2.0**-23, 2e-6),
    torch.float16: Tolerance(4 * 2.0**-11, 1e-4),
    torch.bfloat16: Tolerance(4 * 2.0**-8, 1e-3),
}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """rtol and atol for a value of order one that was computed in float32 (float64) and rounded once to ``dtype``."""
    if dtype not in _TOLERANCES:
        raise TypeError(f"tolerance: dtype must be a floating dtype of packops' kernels, got {dtype}")
    return _TOLERANCES[dtype]


class Errors(NamedTuple):
    """Distances between a result and its reference, over the elements where the reference is finite."""

    max_abs: float
    max_rel: float  # |got - want| / max(|want|, the smallest normal number of got's dtype)
    rms: float
    max_ulp: float  # in units in the last place of got's dtype at the reference


def errors(got: Tensor, want: Tensor) -> Errors:
    """Compare ``got`` (any floating dtype, any device) with ``want`` (float64) of the same shape.

    Raises:
        AssertionError: the shapes differ, or NaNs and infinities are not at the same places.
    """
    if got.shape != want.shape:
        raise AssertionError(f"shapes differ: got {tuple(got.shape)}, want {tuple(want.shape)}")
    info = torch.finfo(got.dtype)
    actual, target = got.detach().double().cpu(), want.detach().double().cpu()
    finite = target.isfinite()
    strange = ~finite & ~((actual == target) | (actual.isnan() & target.isnan())) | (finite & ~actual.isfinite())
    if strange.any():
        where = tuple(strange.nonzero()[0].tolist())
        count = int(strange.sum())
        raise AssertionError(f"at {where}: got {actual[where].item()}, want {target[where].item()} ({count} such places)")
    actual, target = actual[finite], target[finite]
    if target.numel() == 0:
        return Errors(0.0, 0.0, 0.0, 0.0)
    difference = (actual - target).abs()
    magnitude = target.abs().clamp_min(info.tiny)
    ulp = torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps
    return Errors(
        difference.max().item(),
        (difference / magnitude).max().item(),
        difference.square().mean().sqrt().item(),
        (difference / ulp).max().item(),
    )


def assert_close(
    got: Tensor, want: Tensor, *, dtype: torch.dtype | None = None, scale: float = 1.0, name: str = "result"
) -> None:
    """``got`` lies within :func:`tolerance` of the float64 reference ``want``.

    ``dtype``: the least accurate dtype on the way to ``got``, if that is not got's own. ``scale``: multiplies the tolerance, for
    values that are not of order one.
    """
    rtol, atol = tolerance(dtype or got.dtype)
    found = errors(got, want)
    allowed = scale * (atol + rtol * want.detach().double().abs().cpu())
    difference = (got.detach().double().cpu() - want.detach().double().cpu()).abs()
    excess = (difference - allowed).nan_to_num(nan=-1.0)  # where both are infinite or NaN
    if excess.numel() and excess.max() > 0:
        where = tuple(torch.unravel_index(excess.argmax(), excess.shape))
        place = tuple(int(i) for i in where)
        raise AssertionError(
            f"{name} at {place}: got {got[where].item()!r}, want {want[where].item()!r}; "
            f"rtol {scale * rtol:.2g}, atol {scale * atol:.2g}; over all: {found}"
        )


def assert_no_worse_than(got: Tensor, rival: Tensor, want: Tensor, *, factor: float = 1.05, name: str = "result") -> None:
    """The root mean square error of ``got`` is at most ``factor`` times that of ``rival`` (torch's own result, say)."""
    ours, theirs = errors(got, want).rms, errors(rival, want).rms
    floor = torch.finfo(got.dtype).tiny
    if ours > factor * max(theirs, floor):
        raise AssertionError(f"{name}: rms error {ours:.3g} against {theirs:.3g} of the rival, more than {factor} times as much")


def devices() -> list[torch.device]:
    """The devices whose kernels this installation has and this machine can run."""
    import packops

    cuda = torch.cuda.is_available() and packops.has_cuda
    return [torch.device("cpu"), *([torch.device("cuda")] if cuda else [])]
