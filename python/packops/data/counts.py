"""Integers that users hand over, checked where they are given: a float or a bool among them would be wrong in silence later.
And how texts name a number of things."""

from __future__ import annotations

import operator
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

__all__ = ["as_array", "as_count", "as_integer", "as_integers", "counted"]


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def as_integer(name: str, value: Any) -> int:
    """``value`` as a Python int; TypeError for what is no integer, bool included."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        shown = repr(value) if value is None or isinstance(value, (bool, float, str)) else f"a {type(value).__name__}"
        raise TypeError(f"{name} must be an integer, got {shown}") from None


@overload
def as_count(name: str, value: Any, *, least: int = 1, bits: int = 63) -> int: ...
@overload
def as_count(name: str, value: Any, *, least: int = 1, bits: int = 63, optional: bool) -> int | None: ...
def as_count(name: str, value: Any, *, least: int = 1, bits: int = 63, optional: bool = False) -> int | None:
    """``value`` as a Python int from ``least`` to ``2^bits - 1``; with ``optional`` also None.

    Raises:
        TypeError: it is no integer.
        ValueError: it is out of range.
    """
    if optional and value is None:
        return None
    count = as_integer(name, value)
    if not least <= count < 2**bits:
        wanted = f"between {'-2^63' if least == -(2**63) else least} and 2^{bits} - 1"
        if (least, bits) == (1, 63) and count < least:
            wanted = "positive"
        raise ValueError(f"{name} must be {wanted}{' or None' if optional else ''}, got {count}")
    return count


def as_array(name: str, values: Any) -> NDArray[Any]:
    """``np.asarray``, whose errors (ragged lists, tensors on a device or with a gradient) do not say what they are about.

    Raises:
        ValueError: a masked array that masks something, whose mask would be lost.
    """
    if np.ma.is_masked(values):
        raise ValueError(f"{name}: a numpy masked array masks some of its values: hand over the others alone, or .filled()")
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{name}: {error}") from None


def as_integers(name: str, values: Any) -> NDArray[np.int64]:
    """``values`` as a one-dimensional int64 array, which holds negative numbers whatever type they came in.

    Raises:
        TypeError: they are no sequence of integers.
        ValueError: one of them does not fit.
    """
    array = as_array(name, values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a sequence of integers, got shape {array.shape} of {array.dtype}")
    if array.dtype == np.uint64 and array.max(initial=0) > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit int64, got {array.max()}")
    return array.astype(np.int64, copy=False)
