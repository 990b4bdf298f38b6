"""How an op is bound to torch: its fake kernels, its autograd, the branch that a call takes, its errors.

A plain op is two native ops, ``_<name>`` and ``_<name>_backward``, and a public one, ``<name>``, with the same tensors in front
and the options behind them by keyword. A subclass of :class:`Op` says what is special about one; the rest stands here once.

A call takes the shortest way that is right. Eager calls go straight to ``_<name>``, through an :class:`autograd.Function` where a
gradient is wanted. A compiled call goes to ``torch.ops.<namespace>.<name>``, which is the same op for everybody else: it is
differentiable, compiles and exports.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._pytree import _register_namedtuple
from torch.utils.checkpoint import SAC_IGNORED_OPS

from .._errors import raise_typed
from . import autocast
from .arguments import check_options, check_types, explain, kinds_of
from .derivatives import (
    explain_batches,
    is_differentiated,
    no_forward_mode,
    once,
    over_batch,
    refuse_transforms,
    transforms_are_active,
)

_LIBRARIES: list[torch.library.Library] = []  # a Library unregisters its kernels when it is collected
_any_autocast = autocast.is_any
_any_mode: Callable[[], int] = torch._C._len_torch_dispatch_stack  # that traces, counts or keeps what ops do


def library(namespace: str) -> torch.library.Library:
    """Where kernels of ``torch.ops.<namespace>`` are registered, for as long as the process lives."""
    _LIBRARIES.append(torch.library.Library(namespace, "FRAGMENT"))
    return _LIBRARIES[-1]


def typed(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """An autograd kernel that raises the type which a native error names."""

    @functools.wraps(kernel)
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return kernel(*arguments, **keywords)
        except RuntimeError as error:
            raise_typed(error)

    return call


def below_autograd(overload: Any) -> Callable[..., Any]:
    """``overload`` as it is called inside an autograd kernel."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments, **keywords)

    return call


def never_cached(*overloads: Any) -> None:
    """Selective checkpointing shall run these again: what it keeps of an op that writes to its arguments is not what it wrote."""
    SAC_IGNORED_OPS.update(overloads)


def may_be_saved(results: type) -> None:
    """``torch.export.save`` takes a program that returns this named tuple."""
    _register_namedtuple(results, serialized_type_name=f"packops.{results.__name__}")


def register_fake(namespace: str, name: str, fake: Callable[..., Any]) -> None:
    """The fake kernel of an op, which also serves meta tensors. It refuses those beside real ones.

    Torch sends such a call to the fake kernel, whose result would be uninitialised memory of the real tensors' device. (A host
    ``num_items`` may stand beside meta tensors.)
    """

    @functools.wraps(fake)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        devices = {x.device.type == "meta" for x in arguments if isinstance(x, Tensor)}
        given = [(key, x.device.type == "meta") for key, x in keywords.items() if isinstance(x, Tensor)]
        devices |= {is_meta for key, is_meta in given if is_meta or key != "num_items"}
        if len(devices) > 1:
            schema = getattr(getattr(torch.ops, namespace), name).default._schema
            named = {**dict(zip((argument.name for argument in schema.arguments), arguments, strict=False)), **keywords}
            on_meta = [key for key, x in named.items() if isinstance(x, Tensor) and x.device.type == "meta"]
            others = [key for key, x in named.items() if isinstance(x, Tensor) and x.device.type != "meta"]
            raise ValueError(
                f"packops.{name.strip('_')}: {', '.join(on_meta)} must be on the device of {', '.join(others)}, "
                "got the meta device, whose tensors hold nothing"
            )
        return fake(*arguments, **keywords)

    torch.library.register_fake(f"{namespace}::{name}", checked)


def fakes(namespace: str) -> Callable[[str], Callable[..., None]]:
    """:func:`register_fake` as a decorator: ``fake = fakes(namespace)``, then ``@fake(name)``."""
    return lambda name: functools.partial(register_fake, namespace, name)


def maths_dtype(x: Tensor) -> torch.dtype:
    """In which kernels compute, and what they keep of each row: fp32, for fp64 fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Differentiable(torch.autograd.Function):
    """``apply(op, options, *tensors)``; every op makes a subclass of its own, which is what profilers and ``grad_fn`` show."""

    @staticmethod
    def forward(ctx: Any, op: Op, options: tuple, *tensors: Tensor | None) -> Any:
        outputs = op.raw(*tensors, *options)
        ctx.op, ctx.options = op, options
        return op.keep(ctx, tensors, outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        op: Op = ctx.op
        if torch.is_grad_enabled():
            return None, None, *op.once(grads, ctx.saved_tensors, ctx.options, ctx.needs_input_grad[2:]), *op.no_gradients
        try:
            made = op.gradients(grads, ctx.saved_tensors, ctx.options, ctx.needs_input_grad[2:])
        except RuntimeError as error:
            explain_batches(op.name, error, grads)
        return None, None, *made, *op.no_gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode(ctx.op.name)


class Transformable(torch.autograd.Function):
    """The same for the transforms of torch.func, which want two steps in the place of one, and all that is kept as an output."""

    @staticmethod
    def forward(op: Op, options: tuple, *tensors: Tensor | None) -> Any:
        return op.raw(*tensors, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.op, ctx.options, *tensors = inputs
        ctx.op.keep(ctx, tuple(tensors), output)
        if ctx.op.picks:
            ctx.mark_non_differentiable(*output[ctx.op.results :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        op: Op = ctx.op
        made = op.once(grads[: op.results], ctx.saved_tensors, ctx.options, ctx.needs_input_grad[2:])
        return None, None, *made, *op.no_gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode(ctx.op.name)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, op: Op, options: tuple, *tensors: Tensor | None) -> tuple:
        return over_batch(lambda *parts: Transformable.apply(op, options, *parts), info, in_dims[2:], tensors)


class Op:
    """An op of one namespace. ``op(tensors, options)`` calls it.

    Attributes:
        name: of the public op, and of what messages name.
        differentiable: the tensors that can have a gradient; they stand in front. All others, and all options, have none.
        cast: what it casts under autocast; :mod:`.autocast` has the rules.
        results: how many of the tensors that ``_<name>`` returns are the op's; the others are for the backward pass.
    """

    name: str
    differentiable: tuple[str, ...]
    results = 1
    cast: autocast.Cast | None = None

    def __init__(self, namespace: str):
        ops = getattr(torch.ops, namespace)
        self.namespace = namespace
        self.public = getattr(ops, self.name).default
        self.raw = getattr(ops, f"_{self.name}").default
        self.raw_backward = getattr(ops, f"_{self.name}_backward").default
        arguments = self.public._schema.arguments
        self.kinds = kinds_of(self.public)
        self.defaults = {argument.name: argument.default_value for argument in arguments if argument.kwarg_only}
        self.tensors = tuple(argument.name for argument in arguments if not argument.kwarg_only)
        self.count = len(self.differentiable)
        self.known: set[tuple] = set()
        self.has_constants = type(self).check_constants is not Op.check_constants
        self.call = getattr(self.raw, "_op", self.raw)  # without the Python layer of torch's overload
        self.no_gradients = (None,) * (len(self.tensors) - self.count)
        self.picks = len(self.raw._schema.returns) > self.results  # the first of what `_<name>` returns is the result
        self.Function = cast(type[Differentiable], type("".join(map(str.title, self.name.split("_"))), (Differentiable,), {}))

    def __call__(self, tensors: tuple, options: tuple, plain: bool = False) -> Any:
        """``plain``: the options are known to be of the right types."""
        if is_compiling():
            self.check(tensors, options)
            return self.public(*tensors, **dict(zip(self.defaults, options, strict=True)))
        try:
            if not plain:
                check_options(self.name, self.kinds, self.defaults, options, self.known)
            if self.cast is not None and _any_autocast():
                tensors = self.cast(tensors[0].device.type, tensors)
            if transforms_are_active():
                self.check_constants(tensors)
                return self.result(Transformable.apply(self, options, *tensors))
            if torch.is_grad_enabled():
                if self.has_constants:
                    self.check_constants(tensors)
                for x in tensors[: self.count]:
                    if x is not None and x.requires_grad:
                        return self.Function.apply(self, options, *tensors)
            if forward_ad._current_level >= 0:
                self.check_constants(tensors)
                return self.Function.apply(self, options, *tensors)
            outputs = self.call(*tensors, *options)
            return outputs[0] if self.picks else outputs
        except Exception as error:
            explain(error, self.name, self.kinds, self.named(tensors, options))

    def named(self, tensors: tuple, options: tuple) -> list[tuple[str, Any]]:
        return [*zip(self.tensors, tensors, strict=True), *zip(self.defaults, options, strict=True)]

    def check(self, tensors: tuple, options: tuple) -> None:
        """TypeError or ValueError for what a graph could not say as clearly."""
        check_types(self.name, self.kinds, self.named(tensors, options))
        self.check_constants(tensors)

    # ---- what a subclass may say differently --------------------------------------------------------------------------------

    def fake(self, *tensors: Any, **options: Any) -> Any:
        """Shapes and dtypes of what ``_<name>`` returns."""
        raise NotImplementedError

    def fake_backward(self, *arguments: Any) -> tuple:
        """Shapes and dtypes of what ``_<name>_backward`` returns."""
        raise NotImplementedError

    def check_constants(self, tensors: tuple) -> None:
        """ValueError if a tensor needs a gradient and gets none."""

    def keep(self, ctx: Any, tensors: tuple, outputs: Any) -> Any:
        """Keep for the backward pass what :meth:`gradients` will read, and return the op's result."""
        ctx.save_for_backward(*tensors)
        return outputs

    def gradients(self, grads: tuple, saved: tuple, options: tuple, needs: tuple[bool, ...]) -> tuple:
        """The gradients of the differentiable tensors; ``needs`` says which are wanted."""
        return tuple(self.raw_backward(*grads, *saved, *options))

    # -------------------------------------------------------------------------------------------------------------------------

    def result(self, outputs: Any) -> Any:
        """What the public op returns of what ``_<name>`` returns."""
        return outputs[0] if self.picks else outputs

    def once(self, grads: tuple, saved: tuple, options: tuple, needs: tuple[bool, ...]) -> tuple:
        """:meth:`gradients` where somebody may differentiate them."""

        def compute(*tensors: Tensor | None) -> tuple:
            return self.gradients(tensors[: len(grads)], tensors[len(grads) :], options, needs)

        return cast(tuple, once(self.name, compute, *grads, *saved))

    def register(self) -> None:
        """Give the ops their fake kernels, and the public one its autograd."""
        register_fake(self.namespace, f"_{self.name}", self.fake)
        register_fake(self.namespace, self.name, lambda *tensors, **options: self.result(self.fake(*tensors, **options)))
        register_fake(self.namespace, f"_{self.name}_backward", self.fake_backward)
        public = below_autograd(self.public)

        def autograd(*tensors: Any, **options: Any) -> Any:
            refuse_transforms(self.name, f"torch.ops.{self.namespace} has no rules for them; the function in packops has")
            tensors += (None,) * (len(self.tensors) - len(tensors))
            self.check_constants(tensors)
            if any(x is not None and is_differentiated(x) for x in tensors[: self.count]):
                return self.Function.apply(self, tuple({**self.defaults, **options}.values()), *tensors)
            return public(*tensors, **options)

        kernels = library(self.namespace)
        kernels.impl(self.name, typed(autograd), "Autograd")
        if self.cast is not None:
            autocast.register(kernels, self.name, self.public, self.cast)


class Composed(Op):
    """An op whose kernels are Python, made of other ops: :meth:`forward` and :meth:`backward`.

    An op cannot return None, so there an empty tensor stands for it.

    Attributes:
        signature: tensors, then options, as schemas have them.
        returns: of ``_<name>``; the first is the result.
        saved: what ``_<name>_backward`` takes between the result's gradient and the options.
        unkept: options of ``_<name>`` where no backward pass will follow.
    """

    signature: tuple[str, str]
    returns = "Tensor"
    saved: str
    unkept: ClassVar[dict[str, Any]] = {}

    def __init__(self, namespace: str):
        self.define(namespace)
        super().__init__(namespace)
        self.raw, self.raw_backward = unless_seen(self.forward, self.raw), unless_seen(self.backward, self.raw_backward)
        self.call = functools.partial(self.raw, **self.unkept)

    def forward(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def backward(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        """The last argument is which gradients are wanted; the others are None."""
        raise NotImplementedError

    def define(self, namespace: str) -> None:
        kernels, count = library(namespace), len(self.differentiable)
        tensors, options = self.signature

        def required(arguments: str) -> str:
            return ", ".join(argument.partition("=")[0] for argument in arguments.split(", "))

        def public(*given: Any, **named: Any) -> Any:
            missing = (None,) * (len(self.tensors) - len(given))  # a schema's defaults do not arrive
            result = self.forward(*given, *missing, **{**self.defaults, **named, **self.unkept})
            return result[0] if isinstance(result, tuple) else result

        more = "".join(f", bool {name}={not value}" for name, value in self.unkept.items())
        kernels.define(f"{self.name}({tensors}, *, {options}) -> Tensor")
        kernels.define(f"_{self.name}({required(tensors)}, {required(options)}{more}) -> {self.returns}")
        kernels.define(
            f"_{self.name}_backward(Tensor grad, {self.saved}, {required(options)}, bool[{count}] needs) -> "
            f"({', '.join(['Tensor'] * count)})"
        )
        made = ((self.name, public), (f"_{self.name}", self.forward), (f"_{self.name}_backward", self.backward))
        for key in ("CPU", "CUDA"):
            for name, function in made:
                kernels.impl(name, as_kernel(function), key)

    def gradients(self, grads: tuple, saved: tuple, options: tuple, needs: tuple[bool, ...]) -> tuple:
        made = self.raw_backward(*grads, *saved, *options, list(needs))
        return tuple(x if need else None for x, need in zip(made, needs, strict=True))


def as_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """As native kernels are: nobody differentiates or casts what it does."""

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        with torch.no_grad(), autocast.off(given[0].device.type) if _any_autocast() else nullcontext():
            made = function(*given, **named)
        if isinstance(made, Tensor):
            return made
        return tuple(given[0].new_empty((0,)) if x is None else x for x in made)

    return call


def unless_seen(function: Callable[..., Any], op: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` without the way through the dispatcher, 20 µs: unless somebody there must see the op, or autocast is on."""

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        return (op if _any_mode() or _any_autocast() else function)(*given, **named)

    return call
