"""What the arguments of an op must be, read off its schema, and the error that names the one that is something else.

torch's dispatcher refuses a list where a tensor belongs, in words of its own; it takes a tensor for a number, which waits for the
device, and anything that has a truth value for a bool. A call that fails, or has options that are not the defaults, comes here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._errors import raise_typed

F = TypeVar("F", bound=Callable[..., Any])
INTEGERS = (int, np.integer, torch.SymInt)
NUMBERS = (*INTEGERS, float, np.floating, torch.SymFloat)
_WANTED = {
    "Tensor": "a tensor",
    "bool": "a bool",
    "int": "an int on the host",
    "SymInt": "an int on the host",
    "float": "a number on the host",
    "str": "a str",
    "ScalarType": "a torch.dtype",
    "int[]": "a sequence of ints",
    "Mapping": "a mapping",
}
_CLASSES = {"Tensor": Tensor, "bool": bool, "str": str, "ScalarType": torch.dtype, "Mapping": Mapping}
_KINDS_OF_HINTS = {**{hint: kind for kind, hint in _CLASSES.items()}, int: "int", float: "float"}


@functools.cache
def kinds_of(overload: Any) -> dict[str, str]:
    """``{argument: kind}`` of an op's schema; a kind is a key of ``_WANTED``, with ``?`` where None is allowed."""
    text = str(overload._schema)
    inside = text[text.index("(") + 1 : text.rindex(") ->")]
    kinds = {}
    for part in inside.split(", "):
        if part != "*":
            kind, name = part.split("=")[0].split(" ")
            kinds[name] = kind.split("(")[0] + ("?" if kind.endswith("?") else "") if "(" in kind else kind
    return kinds


def _fits(value: Any, kind: str) -> bool:
    if kind in _CLASSES:
        return isinstance(value, _CLASSES[kind])
    if kind == "int[]":
        return isinstance(value, (list, tuple)) and all(_fits(x, "int") for x in value)
    return isinstance(value, NUMBERS if kind == "float" else INTEGERS) and not isinstance(value, (bool, Tensor))


def is_dtensor(value: Any) -> bool:
    """By name: importing the class takes longer than importing packops, and looking at its bases is more than torch compiles."""
    kind = type(value)
    return kind.__name__ == "DTensor" or (not is_compiling() and any(base.__name__ == "DTensor" for base in kind.__mro__))


def check_plain(place: str, name: str, value: Tensor) -> None:
    """TypeError for tensors whose numbers lie elsewhere, or otherwise, than in one strided array."""
    got = None
    if is_dtensor(value):
        got = (
            f"a DTensor, whose parts are on several devices: pass {name}.to_local() where every device computes its own part, or "
            f"{name}.full_tensor()"
        )
    elif value.is_nested:
        got = f"a nested tensor: pass {name}.values() and, where documents matter, its offsets() as cu_seqlens"
    elif value.layout != torch.strided:
        got = f"{value.layout}: pass {name}.to_dense()"
    elif value.is_quantized:
        got = f"a quantized tensor: pass {name}.dequantize()"
    if got:
        raise TypeError(f"{place}: {name} must be a plain tensor, got {got}")


def describe(value: Any) -> str:
    if value is None:
        return "None"
    kind = type(value)
    name = kind.__name__
    if isinstance(value, Tensor):
        return name
    if kind.__module__ == "numpy":  # whose bool is not Python's
        name = f"numpy.{name}"
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}" + (f", {value!r}" if isinstance(value, (bool, int, float, str)) else "")


def check_types(op: str, kinds: Mapping[str, str], values: Iterable[tuple[str, Any]]) -> None:
    """TypeError for the first of the ``(name, value)`` pairs that is not of its kind, ValueError for an int past 64 bits."""
    for name, value in values:
        kind = kinds[name]
        if kind.endswith("?"):
            if value is None:
                continue
            kind = kind[:-1]
        if not _fits(value, kind):
            reason = ""
            if isinstance(value, Tensor):
                reason = ": reading it would wait for the device"
            elif kind == "int[]" and isinstance(value, (list, tuple)):
                reason = f" with {describe(next(x for x in value if not _fits(x, 'int')))}"
            optional = " or None" if kinds[name].endswith("?") else ""
            raise TypeError(f"packops.{op}: {name} must be {_WANTED[kind]}{optional}, got {describe(value)}{reason}")
        # A number that is read off a tensor has no value yet while torch.compile looks at it.
        if not is_compiling() and type(value) is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"packops.{op}: {name} must fit int64, got {value}")
        if kind == "Tensor":
            check_plain(f"packops.{op}", name, value)


def check_options(op: str, kinds: Mapping[str, str], names: Iterable[str], options: tuple, known: set[tuple]) -> None:
    """:func:`check_types` of options in an eager call. ``known``: their types that were right before, which is all that there is
    to know of them, except of a sequence."""
    types = tuple(map(type, options))
    if types in known:
        return
    check_types(op, kinds, zip(names, options, strict=True))
    if list not in types and tuple not in types:
        known.add(types)


def explain(error: Exception, op: str, kinds: Mapping[str, str], values: Iterable[tuple[str, Any]]) -> NoReturn:
    """Raise what a failed call failed of: an argument of the wrong kind, what a native message names, or ``error`` itself."""
    try:
        check_types(op, kinds, values)
    except (TypeError, ValueError) as better:
        raise better from None
    raise_typed(error, op)


def _kind_of_hint(hint: Any) -> str | None:
    """The kind that an annotation stands for; None for annotations that say more than a kind can."""
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        inner = [_kind_of_hint(part) for part in get_args(hint) if part is not type(None)]
        return f"{inner[0]}?" if len(inner) == 1 and inner[0] else None
    if get_origin(hint) is Literal:
        return "str"
    return _KINDS_OF_HINTS.get(get_origin(hint) or hint)


def checks_annotations(function: F) -> F:
    """Decorator: an argument that its annotation does not allow is a TypeError that names it.

    For functions called now and then, and not in graphs. Ops are called often, and have a schema: :class:`.op.Op`.
    """
    signature = inspect.signature(function)
    owner = function.__qualname__.removesuffix(".__init__")

    @functools.cache
    def kinds() -> dict[str, str]:
        return {name: kind for name, hint in get_type_hints(function).items() if (kind := _kind_of_hint(hint)) is not None}

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if is_compiling():  # torch compiles no signatures
            return function(*arguments, **keywords)
        try:
            given = signature.bind(*arguments, **keywords).arguments
        except TypeError:
            return function(*arguments, **keywords)  # which says it in Python's own words
        check_types(owner, kinds(), ((name, value) for name, value in given.items() if name in kinds()))
        return function(*arguments, **keywords)

    return cast(F, call)


def with_options_of(source: Callable[..., Any], *, without: Iterable[str] = ()) -> Callable[[F], F]:
    """Decorator of a function whose ``**options`` are the keyword arguments of ``source``, save those it has itself and those
    ``without``. It gets all of them, defaults filled in; others are a TypeError; and its signature spells them out. Type checkers
    read ``**options: Unpack[...]``."""

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        named = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        absent = {*own.parameters, *without}
        options = [
            parameter
            for parameter in inspect.signature(source).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in absent
        ]
        defaults = {parameter.name: parameter.default for parameter in options}
        known = {*own.parameters, *defaults}

        @functools.wraps(function)
        def call(*arguments: Any, **given: Any) -> Any:
            if not given.keys() <= known:
                name = next(name for name in given if name not in known)
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
            return function(*arguments, **{**defaults, **given})

        call.__signature__ = own.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
        types = get_type_hints(source)  # their names mean something where the source is
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in named}
        call.__annotations__ |= {parameter.name: types[parameter.name] for parameter in options}
        call.__annotations__["return"] = own.return_annotation
        return cast(F, call)

    return decorate
