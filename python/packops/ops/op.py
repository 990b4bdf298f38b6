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
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._errors import raise_typed

_LIBRARIES: list[torch.library.Library] = []  # a Library unregisters its kernels when it is collected


def library(namespace: str) -> torch.library.Library:
    """Where kernels of ``torch.ops.<namespace>`` are registered, for as long as the process lives."""
    _LIBRARIES.append(torch.library.Library(namespace, "FRAGMENT"))
    return _LIBRARIES[-1]


def register_fake(name: str, fake: Callable | None = None) -> Any:
    """``torch.library.register_fake`` for an op that refuses meta tensors beside real ones.

    Torch sends such a call to the fake kernel, whose result would be uninitialised memory of the real tensors' device. (A host
    ``num_items`` may stand beside meta tensors.)
    """
    if fake is None:
        return lambda fake: register_fake(name, fake)
    namespace, op = name.split("::")

    @functools.wraps(fake)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        devices = {x.device.type == "meta" for x in arguments if isinstance(x, Tensor)}
        devices |= {x.device.type == "meta" for key, x in keywords.items() if isinstance(x, Tensor) and key != "num_items"}
        if len(devices) > 1:
            schema = getattr(getattr(torch.ops, namespace), op).default._schema
            named = {**dict(zip((argument.name for argument in schema.arguments), arguments, strict=False)), **keywords}
            on_meta = [key for key, x in named.items() if isinstance(x, Tensor) and x.device.type == "meta"]
            others = [key for key, x in named.items() if isinstance(x, Tensor) and x.device.type != "meta"]
            raise ValueError(
                f"packops.{op.strip('_')}: {', '.join(on_meta)} must be on the device of {', '.join(others)}, "
                "got the meta device, whose tensors hold nothing"
            )
        return fake(*arguments, **keywords)

    torch.library.register_fake(name, checked)
    return fake


def below_autograd(overload: Any) -> Any:
    """``overload`` as it is called inside an autograd kernel."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments, **keywords)

    return call


class Differentiable(torch.autograd.Function):
    """``apply(op, options, *tensors)``; every op makes a subclass of its own, which is what profilers and ``grad_fn`` show."""

    @staticmethod
    def forward(ctx: Any, op: Op, options: tuple, *tensors: Tensor | None) -> Any:
        ctx.op, ctx.options = op, options
        return op.save(ctx, tensors, op.raw(*tensors, *options))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        op = ctx.op
        made = op.gradients(grads, ctx.saved_tensors, ctx.options, ctx.needs_input_grad[2:])
        return None, None, *made, *op.no_gradients


class Op:
    """An op of one namespace. ``op(tensors, options)`` calls it.

    Attributes:
        name: of the public op, and of what messages name.
        differentiable: the tensors that can have a gradient; they stand in front. All others, and all options, have none.
    """

    name: str
    differentiable: tuple[str, ...]

    def __init__(self, namespace: str):
        ops = getattr(torch.ops, namespace)
        self.namespace = namespace
        self.public = getattr(ops, self.name).default
        self.raw = getattr(ops, f"_{self.name}").default
        self.raw_backward = getattr(ops, f"_{self.name}_backward").default
        arguments = self.public._schema.arguments
        self.defaults = {argument.name: argument.default_value for argument in arguments if argument.kwarg_only}
        self.tensors = len(arguments) - len(self.defaults)
        self.no_gradients = (None,) * (self.tensors - len(self.differentiable))
        self.Function = cast(type[Differentiable], type("".join(map(str.title, self.name.split("_"))), (Differentiable,), {}))

    def __call__(self, tensors: tuple, options: tuple) -> Any:
        if is_compiling():
            return self.public(*tensors, **dict(zip(self.defaults, options, strict=True)))
        try:
            if torch.is_grad_enabled():
                for x in tensors[: len(self.differentiable)]:
                    if x is not None and x.requires_grad:
                        self.check_constants(tensors)
                        return self.Function.apply(self, options, *tensors)
            return self.result(self.raw(*tensors, *options))
        except RuntimeError as error:
            raise_typed(error)

    # ---- what a subclass may say differently --------------------------------------------------------------------------------

    def fake(self, *tensors: Any, **options: Any) -> Any:
        """Shapes and dtypes of what ``_<name>`` returns."""
        raise NotImplementedError

    def fake_backward(self, *arguments: Any) -> tuple:
        """Shapes and dtypes of what ``_<name>_backward`` returns."""
        raise NotImplementedError

    def check_constants(self, tensors: tuple) -> None:
        """ValueError if a tensor needs a gradient and gets none."""

    def result(self, outputs: Any) -> Any:
        """What the public op returns of what ``_<name>`` returns."""
        return outputs

    def save(self, ctx: Any, tensors: tuple, outputs: Any) -> Any:
        """Keep for the backward pass what :meth:`gradients` will read, and return the op's result."""
        ctx.save_for_backward(*tensors)
        return outputs

    def gradients(self, grads: tuple, saved: tuple, options: tuple, needs: tuple[bool, ...]) -> tuple:
        """The gradients of the differentiable tensors; ``needs`` says which are wanted."""
        return tuple(self.raw_backward(*grads, *saved, *options))

    # -------------------------------------------------------------------------------------------------------------------------

    def register(self) -> None:
        """Give the ops their fake kernels, and the public one its autograd."""
        prefix = f"{self.namespace}::"
        register_fake(f"{prefix}_{self.name}", self.fake)
        register_fake(f"{prefix}{self.name}", lambda *a, **options: self.result(self.fake(*a, **options)))
        register_fake(f"{prefix}_{self.name}_backward", self.fake_backward)
        public = below_autograd(self.public)

        def autograd(*tensors: Any, **options: Any) -> Any:
            tensors += (None,) * (self.tensors - len(tensors))
            try:
                candidates = tensors[: len(self.differentiable)]
                if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in candidates):
                    self.check_constants(tensors)
                    return self.Function.apply(self, tuple({**self.defaults, **options}.values()), *tensors)
                return public(*tensors, **options)
            except RuntimeError as error:
                raise_typed(error)

        library(self.namespace).impl(self.name, autograd, "Autograd")
